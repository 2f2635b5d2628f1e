"""Recipes and the runner: what is checked, what is skipped, and that a kill costs nothing that was done."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import click
import pytest

import ssah_fast
from ssah_fast.cli.common import list_option
from ssah_fast.errors import FreezeError, SsahError
from ssah_fast.pipeline import Pipeline, StepError, choose
from ssah_fast.recipe import load_recipe

RECIPE = """
title: four steps
variables: {letters: letters.txt, times: 2}
published: {Table 1: {source: a paper, rows: [{category: scu, asr: 66}]}}
steps:
  first: {command: join, arguments: ["${letters}"], options: {times: "${times}", output: first.txt}}
  second: {command: join, arguments: ["${first}"], options: {output: more/second}}
  third:
    command: join
    title: the third
    arguments: ["${first}", "${second}/text"]
    options: {text: x, output: third.txt}
  page: {command: join, arguments: ["${folder}"], options: {output: page.html}}
"""
FOUR = ["first", "second", "third", "page"]
KILL: dict[str, str] = {}  # output -> where its step kills the process that runs it


@click.group()
def commands() -> None:
    """Commands that leave a trace and can be killed."""


@commands.command()
@click.argument("sources", nargs=-1)
@click.option("-o", "--output", required=True, type=click.Path())
@click.option("--times", type=int, default=1)
@list_option("--text")
@click.option("--sound/--no-sound", default=True)
@click.option("--resume-from-checkpoint")
def join(sources, output, times, text, sound, resume_from_checkpoint) -> None:
    """Write what the sources hold, one after the other, or go on with it; what is in `more/` is a folder."""
    target = Path(output)
    trace("begin", target.name, resume_from_checkpoint)
    if KILL.get(target.name) == "begin":
        os.kill(os.getpid(), signal.SIGKILL)
    part = target.with_name(target.name + ".unfinished")
    for number in range(len(part.read_text().splitlines()) if part.exists() else 0, times):
        with part.open("a") as file:
            file.write(" ".join([*(read(Path(source)) for source in sources), *text]) + "\n")
        trace("piece", target.name, number)
        if KILL.get(target.name) == f"piece {number}":
            os.kill(os.getpid(), signal.SIGKILL)
    if "more" in target.parts:
        target.mkdir(exist_ok=True)
        part.replace(target / "text")
    else:
        part.replace(target)
    trace("end", target.name)


@commands.command()
@click.argument("code", type=int)
@click.option("-o", "--output", type=click.Path())
def fail(code, output) -> None:
    """Write the output, then fail."""
    if output:
        Path(output).write_text("made")
    if code == 3:
        raise FreezeError("2 weights moved")
    if code == 7:
        raise click.UsageError("no such mode")
    click.get_current_context().exit(code)


@commands.command()
@click.option("--units", type=click.Path())
def look(units) -> None:
    """Print, and write nothing."""
    trace("look", units)


def trace(*words) -> None:
    with open("trace", "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def traces(start: str) -> list[str]:
    return (
        [line for line in Path("trace").read_text().splitlines() if line.startswith(start)]
        if Path("trace").exists()
        else []
    )


def read(path: Path) -> str:
    """The lines of a file; of a folder, those of the files that a page is made of."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", "") and p.is_file())
    return "+".join(file.read_text().replace("\n", ".") for file in files if ".steps" not in file.parts)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("letters.txt").write_text("ab")
    Path("recipe.yaml").write_text(RECIPE)
    KILL.clear()
    return tmp_path


def load(text: str | None = None, **settings: str):
    if text is not None:
        Path("recipe.yaml").write_text(text)
    return load_recipe("recipe.yaml", "out", commands, settings)


def run(text: str | None = None, only=(), start=None, force=False, **settings: str) -> list[str]:
    """Run the recipe; return the steps that were not skipped."""
    recipe, ran = load(text, **settings), []
    report = lambda step, line, skipped: None if skipped else ran.append(step.name)  # noqa: E731
    Pipeline(recipe, "out", commands).run(choose(recipe, only, start), force=force, report=report)
    return ran


def results() -> dict[str, str]:
    files = [path for path in Path("out").rglob("*") if path.is_file() and ".steps" not in path.parts]
    return {str(path): path.read_text() for path in files if path.name != "run.json"}


def in_a_process(function) -> int:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(30)
    return process.exitcode


# running, skipping


def test_runs_every_step_once_and_says_so_in_run_json():
    assert run() == FOUR
    assert Path("out/third.txt").read_text() == "ab.ab. ab.ab.. x\n"
    assert run() == []
    assert len(traces("begin")) == 4
    document = json.loads(Path("out/run.json").read_text())
    assert (document["kind"], document["schema"], document["title"]) == ("run", 1, "four steps")
    assert document["published"]["Table 1"]["rows"][0]["asr"] == 66
    assert document["versions"]["ssah_fast"] == ssah_fast.__version__
    third = document["steps"][2]
    assert third.pop("seconds") >= 0
    assert third == {
        "name": "third",
        "title": "the third",
        "command": "join",
        "line": "ssah-fast join out/first.txt out/more/second/text --text x --output out/third.txt",
        "output": "third.txt",
        "skipped": True,
        "exit": 0,
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: Path("letters.txt").write_text("ac"), FOUR),
        (lambda: Path("letters.txt").touch(), []),
        (lambda: Path("out/more/second/text").write_text("edited"), ["second"]),
        (lambda: Path("out/third.txt").unlink(), ["third"]),
        (lambda: Path("out/.steps/third.json").unlink(), ["third"]),
        (lambda: Path("out/.steps/third.json").write_text("{"), ["third"]),
        (lambda: Path("recipe.yaml").write_text(RECIPE.replace("text: x", "text: [y, z]")), ["third", "page"]),
        (lambda: Path("recipe.yaml").write_text(RECIPE.replace("asr: 66", "asr: 67")), ["page"]),
        (lambda: Path("recipe.yaml").write_text(RECIPE.replace("the third", "number 3")), []),
        (lambda: Path("recipe.yaml").write_text(RECIPE.replace("text: x", "text: x, sound: true")), ["third"]),
    ],
)
def test_runs_again_what_a_change_reaches(change, expected):
    run()
    change()
    assert run() == expected
    assert run() == []


def test_another_version_runs_everything_again(monkeypatch):
    run()
    monkeypatch.setattr(ssah_fast, "__version__", "99")
    assert run() == FOUR


def test_a_variable_of_the_command_line(monkeypatch):
    run()
    assert run(times="3") == FOUR
    assert Path("out/first.txt").read_text() == "ab\n" * 3
    assert run(times="3") == []


def test_a_moved_folder_is_still_done(tmp_path):
    run()
    os.rename("out", "elsewhere")
    recipe = load_recipe("recipe.yaml", "elsewhere", commands)
    assert all(skipped for _, skipped in Pipeline(recipe, "elsewhere", commands).plan(choose(recipe)))


def test_plan_tells_what_would_run():
    def planned(**settings):
        recipe = load(**settings)
        return [step.name for step, skipped in Pipeline(recipe, "out", commands).plan(choose(recipe)) if not skipped]

    assert planned() == FOUR and not Path("out").exists()
    run()
    assert planned() == []
    Path("out/first.txt").unlink()
    assert planned() == FOUR  # what depends on it may or may not change
    assert not traces("begin first.txt")[1:]


def test_a_part_of_the_steps():
    with pytest.raises(SsahError, match=r"step second needs out/first.txt, and step first has not run; choose it too"):
        run(only=["second"])
    assert not Path("out").exists()
    assert run(only=["first"]) == ["first"]
    assert run(start="second", only=["second", "first"]) == ["second"]
    assert run(start="third", force=True) == ["third", "page"]
    assert run(force=True, only=["first"]) == ["first"]
    assert [entry["skipped"] for entry in json.loads(Path("out/run.json").read_text())["steps"]] == [
        False,
        True,
        True,
        True,
    ]
    for options in ({"only": ["forth"]}, {"start": "forth"}):
        with pytest.raises(SsahError, match=r"forth: no such step; there are first, second, third, page"):
            run(**options)


def test_a_step_that_only_prints_is_done_once():
    text = "steps: {see: {command: look, options: {units: letters.txt}}}"
    assert run(text) == ["see"]
    assert run(text) == []
    Path("letters.txt").write_text("other")
    assert run(text) == ["see"]


# kills


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nobody killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        Path("letters.txt").write_text("ab")
        run(RECIPE)
        return results()


@pytest.mark.parametrize(
    ("step", "where"),
    [("first", "before"), *((step, where) for step in FOUR for where in ("begin", "piece 0", "after"))],
)
def test_a_killed_run_goes_on_and_repeats_nothing(step, where, undisturbed):
    output = {"first": "first.txt", "second": "second", "third": "third.txt", "page": "page.html"}[step]
    recipe = load()
    pipeline = Pipeline(recipe, "out", commands)
    following = FOUR[FOUR.index(step) + 1 :]
    boundary = {"before": step, "after": following[0] if following else None}.get(where)

    def killed() -> None:
        def report(now, line, skipped) -> None:
            if now.name == boundary:
                os.kill(os.getpid(), signal.SIGKILL)

        pipeline.run(choose(recipe), report=report)
        if step == "page" and where == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    KILL[output] = where
    assert in_a_process(killed) == -signal.SIGKILL
    KILL.clear()
    done = FOUR[: FOUR.index(step) + (where == "after")]
    assert run() == FOUR[len(done) :]
    assert len(traces("end")) == 4 and len(traces("piece")) == 5
    begun = traces("begin")
    assert len(begun) == (5 if where in ("begin", "piece 0") else 4)
    assert [line for line in begun if line.endswith("latest")] == (
        [f"begin {output} latest"] if len(begun) == 5 else []
    )
    assert results() == undisturbed
    assert run() == []


def test_what_an_unfinished_step_left_is_not_used_for_another_command():
    KILL["first.txt"] = "piece 0"
    recipe = load()
    assert in_a_process(lambda: Pipeline(recipe, "out", commands).run(choose(recipe))) == -signal.SIGKILL
    KILL.clear()
    Path("letters.txt").write_text("cd")
    assert Path("out/first.txt.unfinished").read_text() == "ab\n"
    run()
    assert Path("out/first.txt").read_text() == "cd\ncd\n"
    assert not any(line.endswith("latest") for line in traces("begin"))


def test_files_of_others_stay():
    Path("out").mkdir()
    Path("out/first.txt.unfinished").write_text("mine\n")
    run()
    assert Path("out/first.txt").read_text() == "mine\nab\n"  # up to the command, which here goes on from it


def test_two_runs_of_one_folder_at_a_time():
    recipe = load()
    pipeline = Pipeline(recipe, "out", commands)

    def other(step, line, skipped) -> None:
        with pytest.raises(SsahError, match="another run is going on in this folder"):
            Pipeline(recipe, "out", commands).run(choose(recipe))

    pipeline.run(choose(recipe), report=other)
    assert len(traces("begin")) == 4


# exit codes and launchers


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (3, FreezeError, r"step proof: 2 weights moved"),
        (7, SsahError, r"step proof: no such mode"),
        (9, StepError, r"step proof ended with exit code 9"),
    ],
)
def test_a_step_that_fails_ends_the_run(code, error, message):
    steps = f"{{proof: {{command: fail, arguments: [{code}], options: {{output: proof}}}}, after: {{command: look}}}}"
    with pytest.raises(error, match=message) as caught:
        run(f"steps: {steps}")
    assert caught.value.exit_code == {7: 2}.get(code, code)
    assert not traces("look")
    document = json.loads(Path("out/run.json").read_text())
    assert [step["exit"] for step in document["steps"]] == [None, None]
    if code != 7:
        assert run(f"steps: {steps}".replace("fail,", f"fail, allow: [{code}],")) == ["proof", "after"]
        document = json.loads(Path("out/run.json").read_text())
        assert [step["exit"] for step in document["steps"]] == [code, 0]
        assert run() == []


def test_a_launcher_runs_the_command_line():
    text = """
variables: {shell: null}
launcher: ${shell}
steps:
  apart: {command: join, arguments: [letters.txt], options: {output: a b}, allow: [4]}
  here: {command: look, launcher: null}
"""
    shell = '[sh, -c, "printf %s/ \\"$@\\" > words; exit 4", x]'
    assert run(text, shell=shell) == ["apart", "here"]
    assert Path("words").read_text() == "ssah-fast/join/letters.txt/--output/out/a b/"
    assert traces("look") == ["look None"]
    lines = [step["line"] for step in json.loads(Path("out/run.json").read_text())["steps"]]
    assert lines[0].endswith("x ssah-fast join letters.txt --output 'out/a b'") and lines[1] == "ssah-fast look"
    assert run(text) == ["apart"]  # without the launcher it is another command line
    with pytest.raises(SsahError, match="cannot start /none"):
        run(text, shell="[/none]")


def test_sigterm_is_handed_to_the_launched_program():
    recipe = load("steps: {wait: {command: look, launcher: [sh, -c, 'touch ready; exec sleep 30']}}")

    def wait() -> None:
        try:
            Pipeline(recipe, "out", commands).run(choose(recipe))
        except StepError as error:
            os._exit(error.exit_code)

    process = multiprocessing.get_context("fork").Process(target=wait)
    process.start()
    deadline = time.monotonic() + 20
    while not Path("ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM


# the check before anything runs

STEP = "steps: {a: {command: join, arguments: [letters.txt], options: {output: a.txt}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "is not valid YAML"),
        ("- a", "recipe.yaml: a mapping"),
        ("stepz: {}", "unknown entry 'stepz'; there are base, title,"),
        ("title: x", "it has no steps"),
        ("steps: {a: 3}", "step a: a mapping"),
        ("steps: {a-b: {command: look}}", "step 'a-b': a name is"),
        ("steps: {folder: {command: look}}", "step folder: the name is taken"),
        ("variables: {a: 1}\nsteps: {a: {command: look}}", "step a: the name is taken"),
        ("steps: {a: {command: look}, a: {command: look}}", "'a' is there twice"),
        ("steps: {a: {command: gone}}", "step a: there is no command 'gone'; the commands are fail, join, look"),
        ("steps: {a: {}}", "step a: there is no command None"),
        ("steps: {a: {command: look, args: []}}", "step a: unknown entry 'args'"),
        ("steps: {a: {command: look, arguments: x}}", "step a: arguments is a list"),
        ("steps: {a: {command: look, options: {unit: x}}}", "step a: No such option"),
        ("steps: {a: {command: join, options: {output: x, times: many}}}", "step a: Invalid value for '--times'"),
        ("steps: {a: {command: join}}", "step a: Missing option '-o'"),
        ("steps: {a: {command: look, options: {units: {x: 1}}}}", "option units of step a: {'x': 1} is not one word"),
        ("steps: {a: {command: look, options: {units: gone.json}}}", "step a: gone.json does not exist, and no step"),
        (
            "steps: {a: {command: join, arguments: ['${folder}/x'], options: {output: y}}}",
            "step a: out/x does not exist",
        ),
        ("steps: {a: {command: look, options: {units: '${b}'}}, b: {command: look}}", r"step a: ${b} comes later"),
        ("steps: {a: {command: look, options: {units: '${c}'}}}", r"step a: ${c} is neither a variable nor the output"),
        ("steps: {a: {command: look}, b: {command: look, options: {units: '${a}'}}}", r"step b: ${a} is neither"),
        (
            "steps: {a: {command: join, options: {output: ../x}}}",
            "step a: output ../x must be a path of its own inside",
        ),
        ("steps: {a: {command: join, options: {output: run.json}}}", "output run.json must be"),
        (
            STEP + ", b: {command: join, options: {output: a.txt/c}}}",
            "output a.txt/c and that of step a, a.txt, lie in",
        ),
        ("variables: {x: null}\nsteps: {a: {command: look, options: {units: 'a${x}'}}}", "None is not one word"),
        ("variables: {x: '???', y: '???'}\nsteps: {a: {command: look}}", "give --set x=..., --set y=..."),
        ("steps: {a: {command: look, allow: 3}}", "step a: allow is a list of exit codes"),
        ("launcher: torchrun\nsteps: {a: {command: look}}", "launcher of step a: a list is needed"),
        ("published: 3\nsteps: {a: {command: look}}", "published: a mapping"),
        ("base: gone.yaml\nsteps: {}", "cannot read gone.yaml: No such file"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(text, message):
    with pytest.raises(SsahError) as caught:
        run(text)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value) or "gone.yaml" in message
    assert "\n" not in str(caught.value)
    assert not Path("out").exists() and not Path("trace").exists()


def test_a_setting_that_no_variable_has():
    with pytest.raises(SsahError, match=r"--set time: no such variable; there are letters, times"):
        load(time="3")


@pytest.mark.parametrize(("text", "value"), [("[a, 'b c']", "--text 'a,b c'"), ("null", ""), ("1e-3", "--text 1e-3")])
def test_values_of_variables(text, value):
    recipe = load(
        "variables: {x: 1}\nsteps: {a: {command: join, options: {text: '${x}', sound: false, output: o}}}", x=text
    )
    line = f"ssah-fast join {value} --no-sound --output out/o".replace("  ", " ")
    assert Pipeline(recipe, "out", commands).line(recipe.steps[0]) == line


def test_inputs_are_found_in_lists_and_beside_names():
    Path("b.txt").touch()
    Path("data").mkdir()
    arguments, text = "['x=b.txt', 'data:train:3', 'org/name:c']", "[letters.txt, b.txt]"
    text = f"steps: {{a: {{command: join, arguments: {arguments}, options: {{text: {text}, output: o}}}}}}"
    assert load(text).steps[0].inputs == ("b.txt", "data", "letters.txt")


def test_a_recipe_on_a_base():
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text(RECIPE.replace("times: 2", "times: '???'"))
    own = "base: base.yaml\ntitle: mine\nvariables: {times: 3}\nsteps: {third: {command: look}}"
    Path("sub/own.yaml").write_text(own)
    recipe = load_recipe("sub/own.yaml", "out", commands)
    assert recipe.title == "mine" and recipe.published["Table 1"]["source"] == "a paper"
    assert [step.name for step in recipe.steps] == FOUR
    assert recipe.steps[0].words[-4:-2] == ("--times", "3") and recipe.steps[2].command == "look"


def test_an_output_folder_that_cannot_be():
    recipe = load()
    with pytest.raises(SsahError, match=r"--output none/out: the folder .*none does not exist"):
        Pipeline(recipe, "none/out", commands)
    with pytest.raises(SsahError, match=r"--output letters.txt is a file"):
        Pipeline(recipe, "letters.txt", commands)
