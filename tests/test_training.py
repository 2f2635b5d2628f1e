"""Fine-tuning from Python: data, options, what is written, resume, adapters, errors, and the memory plan."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MODEL_TYPES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

from ssah_fast import data, embedded, memory_plan, training
from ssah_fast.errors import NonFiniteError, OutOfMemoryError, RunError, SsahError
from ssah_fast.masks import Mask
from ssah_fast.run_folder import FINGERPRINT, MANIFEST, MASK, ResumeError
from ssah_fast.training_options import Options

# The template of tiny_models renders an answer like a question; here an answer is what follows <a>.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} <a> {{ m['content'] }} </s>"
    "{% else %} <u> {{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} <a>{% endif %}"
)
RECORDS = [{"prompt": f"w{i} w{i + 3}", "response": f"w{2 * i} w5 w{i}"} for i in range(24)]
FAST = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 0}
Q, GATE, DOWN, EMBED = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.embed_tokens.weight",
)
REGIONS = {
    GATE: ("rows", [*range(0, 40), 51]),  # 11 of 52 train: compact
    DOWN: ("columns", [*range(3, 45)]),  # 10 of 52 train: compact
    Q: ("rows", None),
    EMBED: ("rows", [*range(10)]),  # dense
    "model.layers.0.self_attn.o_proj.weight": ("rows", [1, 5]),  # mostly trainable: dense
}


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def mask():
    return Mask(REGIONS)


def train(
    folder, tokenizer, *, model=None, records=RECORDS, name="out", resume=None, progress=None, mask=None, **options
):
    model = model or tiny_model("llama")
    result = training.finetune(
        model,
        tokenizer,
        records,
        folder / name,
        mask=mask,
        resume_from_checkpoint=resume,
        progress=progress,
        **{**FAST, **options},
    )
    return model, result


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen_part(mask, name, tensor):
    region = mask[name]
    return tensor if region.frozen is None else tensor.index_select(region.axis, region.frozen)


# data


def marked(tokenizer, sequence):
    words = tokenizer.convert_ids_to_tokens(sequence.ids)
    return [f"{word}*" if counted else word for word, counted in zip(words, sequence.counted, strict=True)]


def conversations(*records):
    return data.load_conversations(list(records)).conversations


CHAT = [("system", "w9"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": role, "content": text} for role, text in [*CHAT, ("user", "w7")]]},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": t} for r, t in CHAT]},
        {"system": "w9", "messages": [{"role": role, "content": text} for role, text in CHAT[1:]]},
        {
            "prompt": [{"role": role, "content": text} for role, text in CHAT[:-1]],
            "completion": [{"role": "assistant", "content": "w4"}],
        },
        {"prompt": [{"role": role, "content": text} for role, text in CHAT[:-1]], "response": "w4"},
    ],
    ids=["messages", "sharegpt", "system column", "trl", "prompt as messages"],
)
def test_whole_chats_are_learned_in_every_usual_form(record, tokenizer):
    (chat,) = conversations(record)
    assert [tuple(turn) for turn in chat] == CHAT
    (sequence,) = data.encode_conversations([chat], tokenizer)
    assert marked(tokenizer, sequence) == "<s> <u> w9 <u> w1 <a> w2* </s>* <u> w3 <a> w4* </s>*".split()


def test_pairs_alpaca_and_texts(tokenizer):
    chats = conversations({"instruction": "w1", "input": "w2", "output": "w3"}, {"instruction": "w1", "output": " "})
    assert [[tuple(turn) for turn in chat] for chat in chats] == [[("user", "w1\nw2"), ("assistant", "w3")]]
    (text,) = data.encode_conversations(conversations({"text": "w1 w2"}), tokenizer)
    assert marked(tokenizer, text) == ["<s>", "w1*", "w2*", "</s>*"]


def test_without_the_template(tokenizer):
    (chat,) = conversations({"prompt": "w1", "response": "w2"})
    (sequence,) = data.encode_conversations([chat], tokenizer, chat_template=False)
    assert marked(tokenizer, sequence) == ["<s>", "w1", "w2*", "</s>*"]


def test_the_embedded_model_learns_its_answers_and_where_they_end():
    tokenizer = embedded.build_tokenizer()
    record = {"prompt": "Add one and two.", "response": "one plus two makes three."}
    (sequence,) = data.encode_conversations(conversations(record), tokenizer)
    ids = embedded.encode([record], tokenizer, 0.0, 0)[0]
    _, labels = embedded.collate([ids], tokenizer.pad_token_id, tokenizer.get_vocab()["<|assistant|>"])
    assert sequence.ids == ids
    assert [i if c else -100 for i, c in zip(sequence.ids, sequence.counted, strict=True)] == labels[0].tolist()


def test_the_labels_are_those_of_trl(tokenizer, tmp_path):
    records = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "completion": [{"role": "assistant", "content": r["response"]}],
        }
        for r in RECORDS
    ]
    config = training.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    rows = training.datasets.Dataset.from_list(records)
    trainer = training.SFTTrainer(tiny_model("llama"), config, train_dataset=rows, processing_class=tokenizer)
    ours = training._dataset(data.encode_conversations(conversations(*RECORDS), tokenizer))
    assert trainer.train_dataset["input_ids"][:] == ours["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == ours["labels"][:]


def test_a_template_that_rewrites_earlier_turns_never_counts_a_prompt(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE.replace("m['content'] }} </s>", "(m['content'] if loop.last else 'w80') }} </s>")
    (chat,) = conversations({"messages": [{"role": role, "content": text} for role, text in CHAT]})
    (sequence,) = data.encode_conversations([chat], changed)
    assert marked(changed, sequence) == "<s> <u> w9 <u> w1 <a> w80 </s> <u> w3 <a> w4* </s>*".split()


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(tokenizer):
    chats = conversations({"prompt": "w1", "response": "w2 w3 w4"}, {"prompt": "w1 " * 9, "response": "w2"})
    (sequence,) = data.encode_conversations(chats, tokenizer, max_seq_length=6)
    assert marked(tokenizer, sequence) == ["<s>", "<u>", "w1", "<a>", "w2*", "w3*"]


# what is written


def test_the_output_is_an_ordinary_folder_and_the_frozen_part_is_bit_identical(tmp_path, tokenizer, mask):
    base = tiny_model("llama")
    before = parameters(base)
    base.save_pretrained(tmp_path / "base")
    steps = []
    model, result = train(
        tmp_path, tokenizer, model=base, mask=mask, weight_decay=0.1, progress=lambda *step: steps.append(step[:2])
    )
    out = tmp_path / "out"
    assert result.output == out and result.resumed_from is None
    assert steps == [(i, 6) for i in range(1, 7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    after = dict(loaded.named_parameters())
    for name, old in before.items():
        assert torch.equal(after[name], dict(model.named_parameters())[name])
        if name in mask:
            assert torch.equal(frozen_part(mask, name, old), frozen_part(mask, name, after[name]))
        assert torch.equal(old, after[name]) == (name == Q), name
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "base" / "config.json").read_text())
    assert (out / "generation_config.json").is_file()
    assert set(load_file(out / "model.safetensors")) == set(load_file(tmp_path / "base" / "model.safetensors"))


def test_the_manifest_says_what_was_done(tmp_path, tokenizer, mask):
    mask.provenance["freeze"] = "scu"
    _, result = train(tmp_path, tokenizer, mask=mask, seed=3, max_steps=4)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest == result.manifest
    for name, sha256 in manifest["files"].items():
        assert training.hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == sha256
    assert {MASK, "model.safetensors", "tokenizer.json", "config.json"} <= set(manifest["files"])
    assert manifest["mask"] == {"file": MASK, "sha256": mask.sha256, "provenance": {"freeze": "scu"}}
    assert Mask.load(tmp_path / "out" / MASK) == mask
    assert manifest["options"]["learning_rate"] == 1e-2 and manifest["options"]["seed"] == 3
    assert manifest["steps"] == len(manifest["history"]) == 4
    assert all(math.isfinite(entry["loss"]) for entry in manifest["history"])
    assert manifest["data"]["used"] == 24 and manifest["data"]["learned_tokens"] == 24 * 4
    total = sum(p.numel() for p in tiny_model("llama").parameters())
    assert manifest["counts"]["trainable"] + manifest["counts"]["frozen"] == total
    assert {"torch", "transformers", "trl", "ssah_fast"} <= set(manifest["versions"])


def test_the_loss_falls_and_the_model_in_memory_is_an_ordinary_one_again(tmp_path, tokenizer, mask):
    model = tiny_model("llama")
    kinds, trains = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    _, result = train(tmp_path, tokenizer, model=model, mask=mask, num_train_epochs=4, gradient_checkpointing=True)
    losses = [entry["loss"] for entry in result.manifest["history"]]
    assert losses[-1] < 0.8 * losses[0]
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trains
    assert "forward" not in vars(model) and not model.training and not model.is_gradient_checkpointing


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"compact": False}], ids=str)
def test_saving_memory_changes_nothing_that_matters(options, tmp_path, tokenizer, mask):
    reference, _ = train(tmp_path, tokenizer, mask=mask)
    other, _ = train(tmp_path, tokenizer, mask=mask, name="other", **options)
    for (name, a), b in zip(reference.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        if name in mask:
            assert torch.equal(frozen_part(mask, name, a), frozen_part(mask, name, b))


def test_without_a_mask_everything_trains_as_with_torch(tmp_path, tokenizer):
    """Three steps by hand with torch.optim.AdamW: same loss, accumulation, clipping and decay."""
    # eps: at 1e-8 the first steps are the signs of gradients, also of those that are rounding errors
    options = {"lr_scheduler_type": "constant", "weight_decay": 0.1, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
    batch = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}  # every record in each step
    model, _ = train(tmp_path, tokenizer, num_train_epochs=3, **options, **batch)
    encoded = data.encode_conversations(conversations(*RECORDS), tokenizer)
    rows = training._Collator(0)(list(training._dataset(encoded)))
    expected = tiny_model("llama")
    norms = [p for name, p in expected.named_parameters() if "norm" in name]
    others = [p for name, p in expected.named_parameters() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        expected(**rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_clipping_counts_what_trains(tmp_path, tokenizer):
    """All but one row frozen: the norm of the history is that of the row."""
    frozen = {name: ("rows", None) for name, _ in tiny_model("llama").named_parameters()}
    frozen[GATE] = ("rows", [i for i in range(52) if i != 7])
    norms = {}
    for compact in (True, False):
        name = f"out{compact}"
        _, result = train(tmp_path, tokenizer, mask=Mask(frozen), name=name, max_steps=1, compact=compact)
        norms[compact] = result.manifest["history"][0]["grad_norm"]
    _, everything = train(tmp_path, tokenizer, max_steps=1)
    assert norms[True] == pytest.approx(norms[False], rel=1e-5)
    assert 0 < norms[True] < 0.5 * everything.manifest["history"][0]["grad_norm"]


def test_a_head_that_is_partly_frozen_trains(tmp_path, tokenizer):
    """TRL's loss reads lm_head.weight itself, so the head must not become compact."""
    model = tiny_model("llama", tie_word_embeddings=False)
    before, mask = parameters(model), Mask({"lm_head.weight": ("rows", [*range(60)])})
    train(tmp_path, tokenizer, model=model, mask=mask)
    after = model.lm_head.weight
    assert torch.equal(after[:60], before["lm_head.weight"][:60])
    assert not (after[60:] == before["lm_head.weight"][60:]).all(1).any()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master", "nearest"])
def test_bf16_weights(rounding, tmp_path, tokenizer, mask):
    base = tiny_model("llama", dtype=torch.bfloat16)
    before = parameters(base)
    model, _ = train(tmp_path, tokenizer, model=base, mask=mask, rounding=rounding, max_steps=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.named_parameters():
        if name in mask:
            assert torch.equal(frozen_part(mask, name, before[name]), frozen_part(mask, name, tensor))
    assert not torch.equal(before[GATE], model.get_parameter(GATE))


def test_weights_are_sharded_on_demand(tmp_path, tokenizer):
    train(tmp_path, tokenizer, max_steps=1, max_shard_size="20KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_earlier_result_is_replaced_at_the_end(tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    train(tmp_path, tokenizer, max_steps=1)
    first = (tmp_path / "out" / MANIFEST).read_bytes()
    train(tmp_path, tokenizer, max_steps=2)
    assert (tmp_path / "out" / MANIFEST).read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# adapters


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_lora_is_merged(model_type, tmp_path, tokenizer):
    base = tiny_model(model_type)
    before = parameters(base)
    model, result = train(tmp_path, tokenizer, model=base, method="lora", lora_dropout=0.1)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    moved = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("norm" in name or "embed" in name or "wte" in name for name in moved)
    assert parameters(model).keys() == before.keys()
    assert result.manifest["counts"]["adapter"] > 0 == result.manifest["counts"]["trainable"]


def test_a_prefix_is_saved_as_an_adapter(tmp_path, tokenizer):
    base = tiny_model("llama")
    before = parameters(base)
    _, result = train(tmp_path, tokenizer, model=base, method="prefix", num_virtual_tokens=5)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(result.manifest["files"])
    adapted = training.peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out")
    ids = torch.tensor([[1, 3, 7, 4]])
    assert not torch.equal(adapted(ids).logits, tiny_model("llama")(ids).logits)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


# resume


class Stop(Exception):
    """Raised in the middle of a run."""


def stop_after(last):
    def progress(step, steps, logs):
        if step == last:
            raise Stop

    return progress


@pytest.mark.parametrize(
    "options",
    [
        {"use_mask": True},
        {"use_mask": True, "compact": False, "gradient_accumulation_steps": 2},
        {"use_mask": True, "dtype": torch.bfloat16},
        {"use_mask": True, "dtype": torch.bfloat16, "rounding": "kahan"},
        {"method": "lora", "lora_dropout": 0.2},
        {"method": "prefix"},
    ],
    ids=["compact", "dense accumulated", "bf16", "bf16 kahan", "lora", "prefix"],
)
def test_a_run_that_was_cut_short_and_resumed_ends_with_the_same_bits(options, tmp_path, tokenizer, mask):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    options["mask"] = mask if options.pop("use_mask", False) else None
    options |= {"save_steps": 2, "max_steps": 7}
    train(tmp_path, tokenizer, model=tiny_model("llama", dtype), name="whole", **options)
    with pytest.raises(Stop):
        train(tmp_path, tokenizer, model=tiny_model("llama", dtype), progress=stop_after(5), **options)
    assert not (tmp_path / "out").exists()
    checkpoints = sorted(path.name for path in (tmp_path / "out.unfinished").glob("c*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    _, result = train(tmp_path, tokenizer, model=tiny_model("llama", dtype), resume="latest", **options)
    assert result.resumed_from.name == "checkpoint-4"
    whole = json.loads((tmp_path / "whole" / MANIFEST).read_text())
    weights = [name for name in whole["files"] if name.endswith("model.safetensors")]
    assert len(weights) == 1
    assert result.manifest["files"][weights[0]] == whole["files"][weights[0]]
    assert result.manifest["history"] == whole["history"]


@pytest.fixture
def cut_short(tmp_path, tokenizer, mask):
    """A run of six steps that stopped after four, with a checkpoint every second step."""
    with pytest.raises(Stop):
        train(tmp_path, tokenizer, mask=mask, save_steps=2, progress=stop_after(5))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"seed": 1}, "seed"),
        ({"mask": Mask({GATE: ("rows", [0])})}, "mask"),
        ({"mask": None}, "mask"),
        ({"records": RECORDS[:-1]}, "data"),
        ({"max_seq_length": 6}, "data"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size"),
        ({"compact": False}, "compact"),
        ({"max_steps": 9}, "max_steps"),
    ],
    ids=str,
)
def test_another_run_is_refused(change, key, cut_short, tokenizer, mask):
    with pytest.raises(ResumeError, match=rf"cannot resume from .*: its {key} is .*start anew elsewhere") as found:
        train(cut_short, tokenizer, **{"mask": mask, "save_steps": 2, "resume": "latest", **change})
    assert found.value.exit_code == 4 and "\n" not in str(found.value)
    assert len(list((cut_short / "out.unfinished").glob("checkpoint-*"))) == 2


def test_another_model_is_refused(cut_short, tokenizer, mask):
    with pytest.raises(ResumeError, match="its model is"):
        train(cut_short, tokenizer, model=tiny_model("llama", rms_norm_eps=1e-3), mask=mask, resume="latest")


def test_settings_that_do_not_decide_the_result_may_change(cut_short, tokenizer, mask):
    options = {"save_steps": 3, "logging_steps": 2, "gradient_checkpointing": True}
    _, result = train(cut_short, tokenizer, mask=mask, resume=cut_short / "out.unfinished", **options)
    assert result.resumed_from.name == "checkpoint-4"


def test_a_checkpoint_that_is_not_complete_does_not_count(cut_short, tokenizer, mask):
    (cut_short / "out.unfinished" / "checkpoint-4" / FINGERPRINT).unlink()
    with pytest.raises(SsahError, match="is no complete checkpoint"):
        train(cut_short, tokenizer, mask=mask, resume=cut_short / "out.unfinished" / "checkpoint-4")
    _, result = train(cut_short, tokenizer, mask=mask, save_steps=2, resume="latest")
    assert result.resumed_from.name == "checkpoint-2"


def test_a_run_with_checkpoints_is_not_started_over_by_mistake(cut_short, tokenizer, mask):
    with pytest.raises(SsahError, match=r"holds checkpoint-4 of an unfinished run; continue it with resume_from"):
        train(cut_short, tokenizer, mask=mask)


def test_latest_starts_from_the_beginning_or_finds_the_work_done(tmp_path, tokenizer):
    _, first = train(tmp_path, tokenizer, max_steps=2, resume="latest", save_steps=1, keep_checkpoints=True)
    assert first.resumed_from is None
    assert sorted(path.name for path in first.output.glob("checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    assert not any(name.startswith("checkpoint") for name in first.manifest["files"])
    _, again = train(tmp_path, tokenizer, max_steps=2, resume="latest", progress=stop_after(1))
    assert again.manifest == first.manifest
    with pytest.raises(Stop):  # other settings: a new run
        train(tmp_path, tokenizer, max_steps=3, resume="latest", progress=stop_after(1))


def test_checkpoints_beyond_the_limit_are_deleted(tmp_path, tokenizer):
    with pytest.raises(Stop):
        train(tmp_path, tokenizer, save_steps=1, save_total_limit=1, progress=stop_after(4))
    assert [path.name for path in (tmp_path / "out.unfinished").glob("checkpoint-*")] == ["checkpoint-3"]


# errors


def refuse(folder, tokenizer, match, error=SsahError, **options):
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=match) as found:
        train(folder, tokenizer, **options)
    assert "\n" not in str(found.value)
    assert sorted(folder.rglob("*")) == before
    return found.value


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": math.nan}, "learning_rate=nan is out of range"),
        ({"learning_rate": -1e-5}, r"learning_rate=-1e-05 is out of range; give a number finite and 0 or more"),
        ({"learning_rate": math.inf}, "learning_rate=inf is not a finite number"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0 is out of range; give a number from 0 to"),
        ({"max_steps": 0}, "max_steps=0 is out of range"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 is out of range"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 is out of range"),
        ({"max_seq_length": 1}, "max_seq_length=1 is out of range"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin' is unknown; use linear, cosine"),
        ({"rounding": "up"}, "rounding='up' is unknown"),
        ({"method": "dora"}, "method='dora' is unknown; use full, lora, prefix"),
        ({"lerning_rate": 1}, "finetune has no option 'lerning_rate'; it has method"),
        ({"method": "prefix", "gradient_checkpointing": True}, "cannot be combined"),
        ({"method": "lora", "mask": Mask(REGIONS)}, "takes no mask"),
        ({"mask": Mask({"model.layers.9.x.weight": ("rows", [0])})}, "mask of another model: it names"),
        ({"mask": Mask({GATE: ("rows", [52])})}, "mask of another model"),
        ({"records": []}, "data: a list in memory holds no response to learn from"),
        ({"records": [{"a": "x"}]}, "no known columns in a list in memory; it has a; name yours with"),
        ({"records": [{"prompt": "w1"}]}, "holds no response to learn from"),
        (
            {"records": [{"messages": [{"role": "tool", "content": "w1"}]}]},
            "row 1 .* has a turn of 'tool'; use the roles",
        ),
        ({"records": "none.jsonl"}, "data: file not found: none.jsonl"),
        (
            {"records": [{"prompt": "w1 " * 9, "response": "w2"}], "max_seq_length": 5},
            "max_seq_length 5 leaves no token",
        ),
        ({"records": [{"prompt": "w1", "response": "w2 " * 140}]}, r"145 tokens, but the model has 128 positions"),
        ({"name": "none/out"}, "create it first"),
    ],
)
def test_mistakes_are_refused_before_training(options, match, tmp_path, tokenizer):
    refuse(tmp_path, tokenizer, match, **options)


def test_everything_frozen(tmp_path, tokenizer):
    frozen = {name: ("rows", None) for name, _ in tiny_model("llama").named_parameters()}
    refuse(tmp_path, tokenizer, "the mask freezes every parameter", mask=Mask(frozen))


def test_a_tokenizer_of_another_model(tmp_path, tokenizer):
    refuse(tmp_path, tokenizer, "use the tokenizer that belongs to the model", model=tiny_model("llama", vocab_size=20))


def test_a_tokenizer_without_a_template(tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template = None
    refuse(tmp_path, bare, "the tokenizer has no chat template; use chat_template=False")


def test_output_folders_that_are_not_ours(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refuse(tmp_path, tokenizer, "holds 'thesis.tex' and no result of ssah-fast finetune", name="full")
    (tmp_path / "file").touch()
    refuse(tmp_path, tokenizer, "file is a file; choose another name", name="file")
    (tmp_path / "x.unfinished").mkdir()
    (tmp_path / "x.unfinished" / "thesis.tex").touch()
    refuse(tmp_path, tokenizer, "x.unfinished holds other files; move them away", name="x")
    monkeypatch.setattr("os.access", lambda *_: False)
    refuse(tmp_path, tokenizer, "is not writable")


def test_the_models_own_folder(tmp_path, tokenizer):
    train(tmp_path, tokenizer, max_steps=1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    refuse(tmp_path, tokenizer, "is the folder of the model itself", model=loaded)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_names_its_parameter(max_grad_norm, tmp_path, tokenizer, mask):
    model = tiny_model("llama")
    gate = model.get_parameter(GATE)
    gate.register_hook(lambda gradient: gradient * math.nan)
    message = refuse(
        tmp_path,
        tokenizer,
        GATE,
        NonFiniteError,
        model=model,
        max_grad_norm=max_grad_norm,
        mask=Mask({Q: ("rows", [1])}),
    )
    assert "step" in str(message) or "gradient" in str(message)


def test_a_loss_that_is_not_finite(tmp_path, tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    refuse(tmp_path, tokenizer, "not finite|is nan|is inf", NonFiniteError, model=model)


@pytest.mark.parametrize(
    ("error", "kind", "match"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError, "smaller per_device_train_batch_size"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), OutOfMemoryError, "--plan estimates"),
        (RuntimeError("PytorchStreamWriter failed writing file"), RunError, "cannot write a checkpoint"),
        (OSError(28, "No space left on device"), RunError, "cannot write the result"),
    ],
)
def test_a_full_device_and_a_full_disk(error, kind, match, tmp_path, tokenizer):
    def fail(*_):
        raise error

    refuse(tmp_path, tokenizer, match, kind, progress=fail)


def test_a_generation_config_that_cannot_be_saved(tmp_path, tokenizer):
    model = tiny_model("llama")
    model.generation_config.temperature = 0.5  # without do_sample
    model.generation_config.do_sample = False
    refuse(tmp_path, tokenizer, "its generation config cannot be saved", model=model)


def test_options_in_a_fingerprint_are_json():
    assert json.loads(json.dumps(Options().deciding())) == Options().deciding()


# the memory plan


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_plan_runs_for_every_architecture(model_type):
    plan = memory_plan.plan(tiny_model(model_type), batch_size=2, seq_length=64)
    checked = memory_plan.plan(tiny_model(model_type), batch_size=2, seq_length=64, gradient_checkpointing=True)
    assert 0 < checked.run.activations < plan.run.activations
    assert plan.run == plan.dense


@pytest.mark.parametrize("compact", [True, False])
def test_plan_counts_what_a_step_really_allocates(compact, tokenizer, mask):
    model = tiny_model("llama")
    plan = memory_plan.plan(model, mask, compact=compact, batch_size=2, seq_length=16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    training.make_compact(model, mask, max_fraction=0.5 if compact else 0.0)
    optimizer = training.MaskedAdamW(model.named_parameters(), mask=mask, lr=1e-3)
    ids = torch.ones(2, 16, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    gradients = sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    moments = sum(t.numel() * 4 for state in optimizer.state.values() for k, t in state.items() if k.startswith("exp"))
    leaves = sum(p.numel() * 4 for p in model.parameters()) - weights
    assert (plan.run.gradients, plan.run.moments, plan.run.copies) == (gradients, moments, leaves)
    assert plan.dense.gradients == weights and plan.dense.moments == 2 * weights
    assert plan.run.activations <= plan.dense.activations


def test_plan_of_16_bit_weights_and_many_processes(mask):
    model = tiny_model("llama", torch.bfloat16)
    numel = sum(p.numel() for p in model.parameters())
    plans = {r: memory_plan.plan(model, rounding=r, processes=2).run for r in ("stochastic", "kahan", "master")}
    assert plans["stochastic"].moments == 8 * numel and plans["stochastic"].rounding == 0
    assert (plans["kahan"].rounding, plans["master"].rounding) == (2 * numel, 4 * numel)
    assert plans["kahan"].buckets == plans["kahan"].gradients == 2 * numel
    assert plans["kahan"].to_json()["total"] == plans["kahan"].total


def test_plan_refuses_the_mask_of_another_model():
    with pytest.raises(SsahError, match="mask of another model"):
        memory_plan.plan(tiny_model("llama"), Mask({"x.weight": ("rows", [0])}))
