"""Scores a model: one forward pass of the model's own code over both calibration sets, with the readers watched.

Nothing is kept of an activation but its channels' moments: 32 bytes per channel and set (two halves of mean and M2 in
float64). A model in memory runs as it is (`score`). A checkpoint (`score_checkpoint`) is loaded, or streamed layer by
layer if it does not fit; its run may be shared by several processes, and goes on from its progress after a kill.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ssah_fast import fingerprints, loading
from ssah_fast.calibration import Calibration, Settings, Source
from ssah_fast.checkpoints import pickled_weights
from ssah_fast.collector import Report
from ssah_fast.errors import ResumeError, SsahError
from ssah_fast.hidden_states import HiddenStates
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.progress import INTERVAL, Progress, State
from ssah_fast.ranks import Ranks, join
from ssah_fast.score_plan import Choice, choose, default_tokens
from ssah_fast.scores import Scores
from ssah_fast.scoring_run import ScoringRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    safety: Source,
    utility: Source,
    tokens: str = "response",
    estimator: str = "variance",
    attention_unit: str = "channel",
    nsamples: int | None = 128,
    seqlen: int = 512,
    seed: int = 0,
    batch_size: int | None = None,
    chat_template: bool = True,
    prompt_column: str | None = None,
    response_column: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    progress: Report | None = None,
) -> Scores:
    """Measure the importance of every unit on a safety set and a utility set.

    I = Var(input channel) x squared norm of its output column (SSAH, arXiv 2410.10862), over tokens: the exact pooled
    variance of all counted tokens. The model runs as it is, without lm_head and cache; it is left as it was, also after
    an error.

    Args:
        model: A causal language model of a supported architecture, wrapped (DataParallel, torch.compile) or not, on
            the device to run on.
        tokenizer: Its tokenizer.
        safety: Path, hub id (``name:config:split``), several of them separated by commas, a list of
            {"prompt", "response"}, or what data.load_pairs returned.
        utility: As ``safety``.
        tokens: Which tokens count: "response", "prompt" or "all". Padding and BOS never do.
        estimator: "variance"; "norm" (mean square, after Wanda); "flap" (the recurrence as released with FLAP, one
            sequence at a time whatever ``batch_size``).
        attention_unit: "channel" (a value channel) or "head" (a whole KV group).
        nsamples: Pairs drawn from each set; None takes all.
        seqlen: Longest sequence in tokens; the rest is cut.
        seed: Of the draw.
        batch_size: Sequences per forward pass; None chooses by length.
        chat_template: Wrap prompts in the tokenizer's chat template.
        prompt_column: Column of the prompts, where it is not recognised. Likewise:
        response_column: Column of the responses.
        text_column: Column of plain texts.
        messages_column: Column of conversations.
        progress: Called with (tokens done, tokens in all) after every batch.

    Returns:
        Scores of every attention and MLP module.

    Raises:
        SsahError: An argument is wrong, the architecture is unknown, or the data cannot be used.
        NonFiniteError: A NaN or Inf in the weights or activations.
        OutOfMemoryError: One sequence does not fit on the device.
    """
    settings = Settings(
        tokens=tokens,
        estimator=estimator,
        attention_unit=attention_unit,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        batch_size=batch_size,
        chat_template=chat_template,
        prompt_column=prompt_column,
        response_column=response_column,
        text_column=text_column,
        messages_column=messages_column,
    )
    network: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    calibration = Calibration.encode(settings.load(safety, utility), network, tokenizer, settings)
    run = ScoringRun.in_memory(model, calibration, settings)
    usual = Choice(stream=False, batch_tokens=default_tokens(run.collector.device))
    modules = run.execute(usual, progress) or {}
    return Scores(modules, _provenance(network, tokenizer, calibration, settings), estimator)


def score_checkpoint(
    name: str,
    *,
    safety: Source,
    utility: Source,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    save_every: float = INTERVAL,
    stream: str = "auto",
    max_memory: int | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Report | None = None,
    told: Callable[[Choice, State | None], None] = lambda choice, state: None,
    **settings: Any,
) -> Scores | None:
    """Score a checkpoint of any size: in memory if it fits, else one decoder layer at a time.

    Both ways give the same bits for the same batches. Under torchrun, the processes share the batches out, and rank 0
    gets the merged scores.

    Args:
        name: A folder in Hugging Face format, or a hub id.
        safety: As in `score`.
        utility: As in `score`.
        output: The scores file to write. While the run lasts, its progress is saved in "<output>.progress", from where
            the same call goes on after a kill; None: the run is neither saved nor written.
        fresh: Forget what an earlier run saved.
        save_every: Seconds between saves.
        stream: "auto" (where the model does not fit), "always" or "never".
        max_memory: Bytes of the device's memory (a CPU: of this process) to stay below; None: what the machine has.
        revision: Branch, tag or commit of a hub id.
        dtype: "auto" (the checkpoint's), "bf16", "fp16", "fp32" or "fp64".
        device: "auto", "cpu", "cuda", "cuda:1", ...; under torchrun "auto" and "cuda" are the process's own GPU.
        device_map: accelerate's, to spread a model over the GPUs of this machine; never streams.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_pickle: Read pickled weights where there are no others; they are never streamed.
        progress: Called with (tokens done, tokens in all); a streamed run counts a token once per layer.
        told: Called with what was decided and, where a saved run continues, with its state, before anything heavy.
        settings: The other arguments of `score`: tokens, estimator, attention_unit, nsamples, seqlen, ...

    Returns:
        The scores; None on every rank but 0.

    Raises:
        SsahError: An argument is wrong, the checkpoint is damaged or of an unknown architecture, or the data cannot be
            used.
        ResumeError: The saved progress is of another run.
        NonFiniteError: A NaN or Inf in the weights or activations.
        OutOfMemoryError: The smallest batch does not fit.
        KeyboardInterrupt: Ctrl-C, after a save.
    """
    chosen = Settings(**settings)
    pairs = chosen.load(safety, utility)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source = {**common, "dtype": dtype}
    if device_map is not None and stream == "always":
        raise SsahError(
            f"--stream always has one layer in memory at a time, --device-map {device_map} has all of them; "
            "leave one of the two out"
        )
    with join(chosen.estimator) as ranks, contextlib.ExitStack() as held:
        target = loading.torch_device(ranks.device(device))
        checkpoint = held.enter_context(_opened(name, target, source, stream, allow_pickle))
        calibration = Calibration.encode(pairs, checkpoint.model, checkpoint.tokenizer, chosen)
        decisive = {
            "model": checkpoint.identity,
            "settings": asdict(chosen),
            "dtype": dtype,
            "device": target.type,
            "device_map": device_map,
            "stream": stream,
            "versions": fingerprints.versions(),
            "data": calibration.sha256,  # behind the settings, which may be why it differs, and say more
        }
        ranks.agree(decisive)
        saves, state = None, None
        if output is not None:
            place = {"rank": ranks.rank, "world": ranks.world}
            fingerprint = {**decisive, "modified": checkpoint.modified}
            saves = Progress(f"{os.fspath(output)}.progress", fingerprint, **place, interval=save_every, fresh=fresh)
            state = saves.load()
        choice = Choice(stream=False, batch_tokens=default_tokens(target))
        if state is not None:
            choice = Choice(**state.extra)
        elif device_map is None:
            choice = choose(
                checkpoint.model,
                calibration.encoded,
                device=target,
                stream=stream if checkpoint.loader else "never",
                max_memory=max_memory,
                batch_size=chosen.batch_size,
                estimator=chosen.estimator,
                ranks=ranks.local_world,
            )
        choice = _agreed(choice, ranks, state is not None)
        told(choice, state)
        if choice.stream and checkpoint.loader is not None:
            folder = None if output is None else Path(output).parent
            hidden = held.enter_context(HiddenStates(choice.hidden, target, folder))
            run = ScoringRun.streamed(checkpoint.loader, hidden, target, calibration, chosen)
            model = checkpoint.model
        else:
            config = loading.load_config(name, common)
            options = {**source, "device_map": device_map, "pickled": checkpoint.loader is None}
            model = loading.load_weights(name, config, device=str(target), **options)
            run = ScoringRun.in_memory(model, calibration, chosen)
        modules, scores = run.execute(choice, progress, ranks, saves, state), None
        if modules is not None:
            provenance = _provenance(model, checkpoint.tokenizer, calibration, chosen, checkpoint.identity["commit"])
            scores = Scores(modules, provenance, chosen.estimator)
            if output is not None:
                scores.save(output)
        ranks.barrier()
        if saves is not None:
            saves.done()
        return scores


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint, checked as far as that goes without reading its weights.

    Attributes:
        model: On the meta device.
        tokenizer: Its tokenizer.
        identity: What tells it from another one, wherever it lies.
        modified: When its files were, in ns since 1970: two fine-tunes may differ in nothing else that is looked at.
        loader: Reads it layer by layer; None where the weights are pickled.
    """

    model: PreTrainedModel
    tokenizer: "PreTrainedTokenizerBase"
    identity: dict[str, Any]
    modified: dict[str, int]
    loader: LayerLoader | None


@contextlib.contextmanager
def _opened(
    name: str, device: torch.device, source: dict[str, Any], stream: str, allow_pickle: bool
) -> Iterator[_Checkpoint]:
    loading.check_folder(name)
    pickled = pickled_weights(name, source["revision"]) if allow_pickle or Path(name).is_dir() else []
    if not pickled:
        with LayerLoader(name, device=device, **source) as loader:
            modified = _modified(loader.files)
            yield _Checkpoint(loader.model, loader.tokenizer, loader.identity(), modified, loader)
        return
    if not allow_pickle:
        raise SsahError(
            f"{name} has pickled weights ({pickled[0].name}) and no others; convert them with save_pretrained, or add "
            "--allow-pickle to read them"
        )
    if stream == "always":
        raise SsahError(
            f"--stream always: {name} has pickled weights, which cannot be read one layer at a time; leave it out, or "
            "convert them with save_pretrained"
        )
    model = loading.empty_model(name, **source)
    tokenizer = loading.load_tokenizer(name, {key: source[key] for key in ("revision", "trust_remote_code")})
    folder = pickled[0].parent
    identity = {
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "config.json": fingerprints.sha256_text(model.config.to_json_string()),
        "files": {path.name: {"bytes": path.stat().st_size} for path in pickled},
    }
    yield _Checkpoint(model, tokenizer, identity, _modified(pickled), None)


def _modified(files: Iterable[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in files}


def _agreed(choice: Choice, ranks: Ranks, resumed: bool) -> Choice:
    """The choice with the tokens per batch that all processes can take: each must cut the data into the same batches.

    Raises:
        ResumeError: This process has begun with larger ones.
    """
    tokens = ranks.smallest(choice.batch_tokens)
    if resumed and tokens != choice.batch_tokens:
        raise ResumeError(
            f"process {ranks.rank} saved its progress with batches of {choice.batch_tokens} tokens, another process "
            f"can take {tokens}; give --batch-size, or add --fresh to start over"
        )
    return replace(choice, batch_tokens=tokens)


def _provenance(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    calibration: Calibration,
    settings: Settings,
    commit: str | None = None,
) -> dict[str, Any]:
    return {
        "model": fingerprints.model_fingerprint(model, commit),
        "model_id": model.config.name_or_path,
        "tokenizer": fingerprints.tokenizer_fingerprint(tokenizer),
        "data": calibration.describe(),
        "settings": asdict(settings),
        "versions": fingerprints.versions(),
    }
