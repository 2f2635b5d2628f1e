"""`ssah-fast run` on the real commands, and the recipes that come with the project."""

import itertools
import json
from pathlib import Path

import pytest
import yaml
from test_cli import make_scores

from ssah_fast.cli.demo import recipe_path
from ssah_fast.cli.main import cli, main
from ssah_fast.partition import Units
from ssah_fast.recipe import MUST_BE_SET, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES, BENCH = ROOT / "docs" / "recipes", ROOT / "bench"
VISAGE, BEFORE_AFTER = LANDSCAPES = (RECIPES / "visage.yaml", RECIPES / "landscape-before-after.yaml")
RECIPE = """
variables: {scu: 10%, scores: scores.safetensors}
steps:
  units: {command: identify, arguments: ["${scores}"], options: {scu: "${scu}", output: units.safetensors}}
  other: {command: identify, arguments: ["${scores}"], options: {scu: 4%, output: "b/other.safetensors"}}
  flow: {command: transfer, arguments: ["${units}", "${other}"], options: {output: transfer.json}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    make_scores().save(tmp_path / "scores.safetensors")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_steps_are_printed_run_and_then_skipped(capsys):
    assert main(["run", "recipe.yaml", "-o", "out", "--set", "scu=6%"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("$ ")] == [
        "$ ssah-fast identify scores.safetensors --scu 6% --output out/units.safetensors",
        "$ ssah-fast identify scores.safetensors --scu 4% --output out/b/other.safetensors",
        "$ ssah-fast transfer out/units.safetensors out/b/other.safetensors --output out/transfer.json",
    ]
    assert err.endswith("all steps are done; out holds their results\n")
    assert Units.load("out/units.safetensors").count("scu") == 9
    assert json.loads(Path("out/transfer.json").read_text())["kind"] == "transfer"
    assert main(["run", "recipe.yaml", "-o", "out", "--set", "scu=6%"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[:3] == [f"{name}: unchanged, skipped" for name in ("units", "other", "flow")]


def test_plan_prints_command_lines_and_writes_nothing(capsys):
    assert main(["run", "recipe.yaml", "-o", "out", "--plan", "--from", "other"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["identify", "transfer"]
    assert not Path("out").exists()
    assert main(["run", "recipe.yaml", "-o", "out", "--only", "units,other"]) == 0
    capsys.readouterr()
    assert main(["run", "recipe.yaml", "-o", "out", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("# unchanged: ssah-fast ") for line in lines] == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "cannot read none.yaml: No such file or directory"),
        (["recipe.yaml", "--set", "scu"], "--set scu is not NAME=VALUE"),
        (["recipe.yaml", "--set", "scores=gone.safetensors"], "step units: gone.safetensors does not exist"),
        (["recipe.yaml", "--set", "scu=many"], "step units: Invalid value for '--scu'"),
        (["recipe.yaml", "--set", "scu=90%"], "step units: "),
        (["recipe.yaml", "--only", "unit"], "--only unit: no such step"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["run", *arguments, "-o", "out"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("ssah-fast: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - {*LANDSCAPES}), ids=lambda path: path.stem)
def test_recipes_of_the_paper(path, folder):
    (folder / "data.jsonl").touch()
    documents = [yaml.safe_load(path.read_text())]
    if "base" in documents[0]:
        documents.append(yaml.safe_load((RECIPES / documents[0]["base"]).read_text()))
    given = {name for document in documents for name, value in document["variables"].items() if value != MUST_BE_SET}
    wanted = {name for document in documents for name in document["variables"]} - given
    examples = {"model": "a/model", "scu": "1%", "ucu": "1%", "ru": "1%"}
    recipe = load_recipe(path, "out", cli, {name: examples.get(name, "data.jsonl") for name in wanted})
    assert recipe.title
    assert {step.command for step in recipe.steps} >= {"score", "identify", "finetune", "verify", "eval", "report"}
    tuned = {step.name for step in recipe.steps if step.command == "finetune"}
    measured = {need for step in recipe.steps if step.command == "eval" for need in step.needs}
    assert tuned == measured
    assert ("published" in documents[0]) == (path.stem != "chat-model")
    for table in (recipe.published or {}).values():
        assert table["source"].startswith("Li & Kim, arXiv 2410.10862")
        assert {row["run"] for row in table["rows"] if "run" in row} <= {*tuned, "before", "adapter"}
        for row in table["rows"]:
            assert ("category" not in row) or {"ratio", "tasks", "asr", "asr_by_system"} <= row.keys()


def test_published_ratios_are_those_that_the_recipe_asks_for(folder):
    for path in RECIPES.glob("*.yaml"):
        document = yaml.safe_load(path.read_text())
        rows = document.get("published", {}).get("Table 1", {"rows": []})["rows"]
        for row in rows[1:]:
            assert float(document["variables"][row["category"]].rstrip("%")) / 100 == pytest.approx(row["ratio"])


def test_the_recipe_of_visage(folder):
    (folder / "data.jsonl").touch()
    recipe = load_recipe(VISAGE, "out", cli, {"harmful_data": "data.jsonl", "llama2_prompts": "[none, data.jsonl]"})
    measured = {step.name: step for step in recipe.steps if step.command == "landscape"}
    assert recipe.step("report").needs == (*measured,) == ("llama3", "llama2", "mistral", "vicuna")
    published = recipe.published["VISAGE"]
    assert [row["model"] for row in published["rows"]] == [step.title for step in measured.values()]
    assert published["source"].startswith("Peng et al.") and "secondary sources" in published["note"]
    asked = {"limit": "80", "alphas": "-0.5:0.5:21", "directions": "3", "direction-seed": "123", "judge": "keyword"}
    asked |= {"max-new-tokens": "512", "num-fewshot": "5", "dtype": "fp32"}
    for step in measured.values():
        words = dict(itertools.pairwise(step.words))
        assert {name: words.get(f"--{name}") for name in asked} == asked


def test_the_recipe_of_landscapes_before_and_after(folder):
    (folder / "data.jsonl").touch()
    given = {"model": "a/model", "safety_data": "data.jsonl", "harmful_data": "data.jsonl"}
    recipe = load_recipe(BEFORE_AFTER, "out", cli, given)
    tuned = {step.name for step in recipe.steps if step.command == "finetune"}
    around = {step.words[1] for step in recipe.steps if step.command == "landscape" and "--to" not in step.words}
    ways = {need for step in recipe.steps if "--to" in step.words for need in step.needs}
    assert around == {"a/model", *(f"${{folder}}/{recipe.step(name).output}" for name in tuned)} and ways == tuned
    proved = {need for step in recipe.steps if step.command == "verify" for need in step.needs}
    assert proved & tuned == tuned - {"tuned_all"}


@pytest.mark.parametrize(
    "path", [recipe_path(), *BENCH.glob("*.yaml")], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_recipes_of_the_embedded_model(path, folder):
    for name in ("safety", "utility", "asr", "look_alikes", "utility_eval", "finetune", "finetune_eval", "align"):
        (folder / "out" / "data").mkdir(parents=True, exist_ok=True)
        (folder / "out" / "data" / f"{name}.jsonl").touch()
    (folder / "out" / "data" / "system_prompt.txt").touch()
    for name in ("model", "base"):
        (folder / "out" / name).mkdir()
    recipe = load_recipe(path, "out", cli)
    commands = [step.command for step in recipe.steps]
    assert "report" in commands and set(commands) >= {"score", "ablate", "finetune", "verify", "eval", "transfer"}
    proved = {need for step in recipe.steps if step.command == "verify" for need in step.needs}
    masked = {step.name for step in recipe.steps if step.command == "finetune" and "--units" in step.words}
    assert masked <= proved
