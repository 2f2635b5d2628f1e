"""`finetune`: train a chat model while what a mask freezes stays bit-identical, resume exactly, and say what was done.

TRL's SFTTrainer runs the loop. Of it are used the loss, which never holds the [tokens, words] logits, and all that
Hugging Face's Trainer brings: schedules, accumulation, checkpoints, many processes. Data come tokenised, with labels
on the answers alone (`ssah_fast.data.encode_conversations`), so that multi-turn chats and any template work.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import ssah_fast
from ssah_fast import data as data_module
from ssah_fast.calibration import check_sequences
from ssah_fast.compaction import LEAF, uncompact
from ssah_fast.compaction import compact as make_compact
from ssah_fast.data import ConversationSet, Encoded
from ssah_fast.errors import NonFiniteError, OutOfMemoryError, RunError, SsahError
from ssah_fast.fingerprints import model_fingerprint
from ssah_fast.loading import silent
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW, clip_grad_norm_, decay_groups
from ssah_fast.run_folder import MASK, SCHEMA, RunFolder, check_fingerprint
from ssah_fast.training_options import Options
from ssah_fast.units import canonical_name

try:
    import accelerate
    import datasets
    import peft
    import trl
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise SsahError(f"fine-tuning needs {error.name}; install it with: pip install 'ssah_fast[train]'") from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not learned

# (step, steps, the last logged loss, grad_norm and learning_rate)
Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes:
        output: The folder it wrote.
        manifest: The content of its ssah_manifest.json.
        resumed_from: The checkpoint it started from.
    """

    output: Path
    manifest: dict[str, Any]
    resumed_from: Path | None


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Sequence[Mapping[str, Any]] | ConversationSet,
    output_dir: str | Path,
    *,
    mask: Mask | None = None,
    resume_from_checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Train a model on the answers of conversations and write it as an ordinary Hugging Face folder.

    The folder appears when all is done; until then checkpoints lie in `output_dir` + ".unfinished". Killed and resumed,
    a run ends with the same bits as an uninterrupted one (same machine, same number of processes and threads). Under
    torchrun or accelerate, call it in every process; process 0 alone writes.

    Args:
        model: Trained in place, in its own precision; afterwards in evaluation mode.
        tokenizer: Its tokenizer.
        data: What `ssah_fast.data.load_conversations` takes, or returns.
        output_dir: The folder to write. It must not exist, be empty, or hold an earlier result, which is replaced.
        mask: What stays bit-identical; None trains everything.
        resume_from_checkpoint: "latest" (from the beginning if there is none), or a checkpoint.
        progress: Called after each optimizer step, in process 0, with (step, steps, logs).
        **options: Fields of `Options`.

    Returns:
        What was done.

    Raises:
        SsahError: Anything wrong with the arguments, before training.
        ResumeError: The checkpoint was made with other data, another mask or other settings.
        NonFiniteError: A loss or a gradient is NaN or infinite; the message names the parameter.
        OutOfMemoryError: The device is full.
        RunError: A file could not be written.
    """
    settings = _options(options)
    if mask is not None and settings.method != "full":
        raise SsahError(f"method={settings.method!r} trains an adapter and takes no mask; use method='full' with one")
    folder = RunFolder(output_dir, "--output" if _from_flags(data) else "output_dir")
    if folder.output == Path(model.config.name_or_path or "/").resolve():
        raise SsahError(f"output_dir {output_dir} is the folder of the model itself; choose another one")
    conversations = _conversations(data, settings)
    encoded = data_module.encode_conversations(
        conversations.conversations,
        tokenizer,
        max_seq_length=settings.max_seq_length,
        chat_template=settings.chat_template,
        argument=conversations.argument,
    )
    check_sequences(model, encoded, conversations.argument, what="conversation", limit="max_seq_length")
    _check_trainable(model, mask)
    with _quiet():
        config = _trainer_config(settings, folder.work, model)
    run = _Run(model, tokenizer, mask, settings, conversations, encoded, folder, config)
    return run.start(resume_from_checkpoint, progress)


# checks


def _options(given: Mapping[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    odd = next((name for name in given if name not in known), None)
    if odd is not None:
        raise SsahError(f"finetune has no option {odd!r}; it has {', '.join(known)}")
    return Options(**given)


def _from_flags(data: Any) -> bool:
    return isinstance(data, ConversationSet) and data.argument.startswith("--")


def _conversations(data: Any, settings: Options) -> ConversationSet:
    if isinstance(data, ConversationSet):
        return data
    return data_module.load_conversations(data, nsamples=settings.nsamples, seed=settings.seed, argument="data")


def _check_trainable(model: PreTrainedModel, mask: Mask | None) -> None:
    if next(model.parameters()).is_meta:
        raise SsahError("model: its weights are on the meta device; load it with from_pretrained")
    if mask is not None:
        mask.check(model.named_parameters(remove_duplicate=False))
    if model.generation_config is not None:
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise SsahError(f"model: its generation config cannot be saved ({reason}); correct it first") from error


def _trainer_config(settings: Options, work: Path, model: PreTrainedModel) -> SFTConfig:
    on_gpu = torch.cuda.is_available() and not settings.use_cpu
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = on_gpu and model.dtype == torch.float32 and torch.cuda.is_bf16_supported()
    config = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,  # transformers 5 reads a number below 1 as a ratio
        seed=settings.seed,
        bf16=bf16,
        fp16=False,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        report_to=settings.report_to,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if config.n_gpu > 1:
        config._n_gpu = 1  # one process trains on one GPU; more of them are torchrun's business
    return config


# the run


@dataclass
class _Run:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask: Mask | None
    settings: Options
    conversations: ConversationSet
    encoded: list[Encoded]
    folder: RunFolder
    config: SFTConfig

    def start(self, resume: str | Path | None, progress: Progress | None) -> Result:
        fingerprint = self._fingerprint()
        done = self.folder.finished() if resume == "latest" and not self.folder.checkpoints() else None
        if done is not None and done.get("fingerprint") == fingerprint:
            return Result(self.folder.output, done, None)  # a restarted job whose work is done
        checkpoint = self.folder.find(resume)
        if checkpoint is not None:
            check_fingerprint(checkpoint, fingerprint)
        self._wait()  # every process has looked before the first one writes
        if self.writes:
            self.folder.open()
        self._wait()
        begin = time.time()
        try:
            with _explained(), _quiet():
                counts = self._counts()
                with _restored(self.model):
                    trainer = self._train(checkpoint, fingerprint, progress)
                    counts["adapter"] = _trainable(cast(nn.Module, trainer.model)) if self._adapter else 0
                manifest = {**self._manifest(trainer, fingerprint), "counts": counts}
                manifest["seconds"] = round(time.time() - begin, 3)
                model = cast(Any, trainer.model)
                if self.settings.method == "lora":
                    model = model.merge_and_unload()
                if self.writes:
                    self._save(model)
                    self.folder.publish(manifest, keep_checkpoints=self.settings.keep_checkpoints)
        except BaseException:
            if self.writes:
                self.folder.abandon()
            raise
        self._wait()
        return Result(self.folder.output, self.folder.finished() or manifest, checkpoint)

    @property
    def _adapter(self) -> bool:
        return self.settings.method != "full"

    def _counts(self) -> dict[str, Any]:
        """Elements of the model that train and that are frozen, in all and per kind of tensor and category."""
        if self._adapter:
            return {"trainable": 0, "frozen": sum(p.numel() for p in self.model.parameters())}
        rows = (self.mask or Mask({})).summary(self.model.named_parameters())
        return {**{key: sum(row[key] for row in rows) for key in ("trainable", "frozen")}, "rows": rows}

    @property
    def writes(self) -> bool:
        """Whether this process writes: process 0 alone does."""
        return self.config.process_index == 0

    def _wait(self) -> None:
        accelerate.PartialState().wait_for_everyone()

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "model": model_fingerprint(self.model),
            "data": _hash_encoded(self.encoded),
            "mask": None if self.mask is None else self.mask.sha256,
            "processes": self.config.world_size,
            "bf16": self.config.bf16,
            **{name: value for name, value in self.settings.deciding().items() if name != "bf16"},
        }

    def _train(self, checkpoint: Path | None, fingerprint: dict[str, Any], progress: Progress | None) -> SFTTrainer:
        transformers.set_seed(self.settings.seed)
        model = self._prepare()
        keeper = _Keeper(self.folder, fingerprint, self.settings.save_total_limit, progress if self.writes else None)
        trainer = SFTTrainer(
            model=model,
            args=self.config,
            train_dataset=_dataset(self.encoded),
            processing_class=self.tokenizer,
            data_collator=_Collator(data_module.pad_id(self.tokenizer)),
            callbacks=[keeper],
        )
        trainer.optimizer = self._optimizer(cast(nn.Module, trainer.model))
        vars(trainer)["create_model_card"] = lambda *_, **__: None  # a checkpoint is no release
        vars(trainer.accelerator)["clip_grad_norm_"] = _Clip(model, self.mask, trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer

    def _prepare(self) -> PreTrainedModel | peft.PeftModel:
        """Make the model ready for the method: freeze, make compact, or wrap in an adapter."""
        settings = self.settings
        if settings.method == "lora":
            adapter: peft.PeftConfig = peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules="all-linear",
            )
        elif settings.method == "prefix":
            adapter = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.num_virtual_tokens)
        else:
            if self.mask is not None:
                mask = _without_head(self.model, self.mask)
                make_compact(self.model, mask, max_fraction=0.5 if settings.compact else 0.0)
            return self.model
        try:
            return peft.get_peft_model(self.model, adapter)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            architecture = type(self.model).__name__
            raise SsahError(f"method={settings.method!r}: peft cannot adapt {architecture} ({error})") from error

    def _optimizer(self, model: nn.Module) -> MaskedAdamW:
        # Not through `optim.trainer_kwargs`, whose hooks would stay on the caller's parameters; `_Clip` knows the mask.
        settings = self.settings
        return MaskedAdamW(
            decay_groups(model),
            mask=self.mask,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            rounding=settings.rounding,
            seed=settings.seed,
            # Where the norm is bounded, `_Clip` has looked at all gradients; on a GPU every look waits for the device.
            check_grads=settings.max_grad_norm == 0,
        )

    def _save(self, model: PreTrainedModel | peft.PeftModel) -> None:
        """Write model, tokenizer and mask into the working folder."""
        model.save_pretrained(str(self.folder.work), max_shard_size=self.settings.max_shard_size)
        self.tokenizer.save_pretrained(self.folder.work)
        if self.mask is not None:
            (self.folder.work / MASK).parent.mkdir(exist_ok=True)
            self.mask.save(self.folder.work / MASK)

    def _manifest(self, trainer: SFTTrainer, fingerprint: dict[str, Any]) -> dict[str, Any]:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        mask = self.mask
        return {
            "kind": "finetune",
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "base": {"id": self.model.config.name_or_path, **fingerprint["model"]},
            "method": self.settings.method,
            "options": {**asdict(self.settings), "bf16": self.config.bf16, "max_steps": trainer.state.max_steps},
            "processes": self.config.world_size,
            "mask": None if mask is None else {"file": MASK, "sha256": mask.sha256, "provenance": mask.provenance},
            "data": {
                "sources": self.conversations.sources,
                "available": self.conversations.available,
                "used": len(self.encoded),
                "without_answer_left": len(self.conversations.conversations) - len(self.encoded),
                "tokens": sum(len(sequence.ids) for sequence in self.encoded),
                "learned_tokens": sum(sum(sequence.counted) for sequence in self.encoded),
                "sha256": self.conversations.sha256,
                "tokens_sha256": fingerprint["data"],
            },
            "steps": trainer.state.global_step,
            "train_loss": _finite(history[-1]["loss"]) if history else None,
            "history": [{key: _finite(entry[key]) for key in _LOGGED if key in entry} for entry in history],
            "versions": _versions(),
        }


_LOGGED = ("step", "loss", "grad_norm", "learning_rate")


class _Keeper(TrainerCallback):
    """Marks checkpoints as complete, reports progress and stops at a loss that is not finite."""

    def __init__(
        self, folder: RunFolder, fingerprint: Mapping[str, Any], limit: int, progress: Progress | None
    ) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._limit = limit
        self._progress = progress
        self._logs: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        self._logs = {key: float(value) for key, value in (logs or {}).items() if key in _LOGGED}
        if not math.isfinite(self._logs.get("loss", 0.0)):
            what = f"the loss of step {state.global_step} is {self._logs['loss']}"
            raise NonFiniteError(f"{what}; lower the learning rate or check the data")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, self._logs)
        if state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than logging_steps has a loss, too

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        accelerate.PartialState().wait_for_everyone()  # each process has written its random state
        if state.is_world_process_zero:
            checkpoint = self._folder.work / f"checkpoint-{state.global_step}"
            self._folder.seal(checkpoint, self._fingerprint, self._limit)


@dataclass
class _Clip:
    """In place of Accelerator.clip_grad_norm_, which would count the gradients of frozen elements."""

    model: nn.Module
    mask: Mask | None
    trainer: SFTTrainer

    def __call__(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2) -> torch.Tensor:
        named = self.model.named_parameters()
        try:
            return clip_grad_norm_(named, max_norm, norm_type, error_if_nonfinite=True, mask=self.mask)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.trainer.state.global_step + 1}: {self._culprit() or error}") from error

    def _culprit(self) -> str | None:
        """The first gradient that is not finite; None where only the norm of all of them overflows."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                name = canonical_name(name).replace(f".{LEAF}", ".weight")
                return f"the gradient of {name} is not finite; lower the learning rate or check the data"
        return None


@dataclass(frozen=True)
class _Collator:
    """Pads on the right to the longest sequence of the batch."""

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: Callable[[Mapping[str, list[int]]], list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*values(row), *[filler] * (width - len(row["input_ids"]))] for row in rows])

        return {
            "input_ids": padded(lambda row: row["input_ids"], self.pad),
            "attention_mask": padded(lambda row: [1] * len(row["input_ids"]), 0),
            "labels": padded(lambda row: row["labels"], IGNORED),
        }


def _dataset(encoded: Sequence[Encoded]) -> datasets.Dataset:
    labels = [[i if c else IGNORED for i, c in zip(s.ids, s.counted, strict=True)] for s in encoded]
    return datasets.Dataset.from_dict({"input_ids": [sequence.ids for sequence in encoded], "labels": labels})


def _hash_encoded(encoded: Iterable[Encoded]) -> str:
    """Hash of exactly what is trained on: token ids, and which of them are learned."""
    digest = hashlib.sha256()
    for sequence in encoded:
        digest.update(array("q", [len(sequence.ids), *sequence.ids]).tobytes() + bytes(sequence.counted))
    return digest.hexdigest()


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _without_head(model: PreTrainedModel, mask: Mask) -> Mask:
    """The mask without a part of the head: TRL's loss reads lm_head.weight itself, past a compact layer's forward."""
    head = model.get_output_embeddings()
    weight = None if head is None else head.weight
    names = {canonical_name(name) for name, p in model.named_parameters(remove_duplicate=False) if p is weight}
    return Mask({name: region for name, region in mask.items() if name not in names or region.frozen is None})


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _versions() -> dict[str, str]:
    modules = (ssah_fast, torch, transformers, trl, accelerate, peft, datasets)
    return {**{module.__name__: module.__version__ for module in modules}, "python": platform.python_version()}


@contextlib.contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Take back what training does to a model beside its weights: TRL and accelerate replace its forward."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    forward, use_cache = vars(model).get("forward"), getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        uncompact(model)
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if forward is not None:
            vars(model)["forward"] = forward
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains.get(name, parameter.requires_grad))
            parameter.grad = None
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.gradient_checkpointing_disable()
        model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries below from printing: what matters becomes an error, a callback or the manifest."""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn a full device and a failed write into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise OutOfMemoryError(
                "out of memory in training; use a smaller per_device_train_batch_size (--per-device-train-batch-size) "
                "or max_seq_length, or gradient_checkpointing; --plan estimates what a run needs"
            ) from error
        if "PytorchStreamWriter" in str(error):  # torch.save on a full disk
            raise RunError(f"cannot write a checkpoint ({' '.join(str(error).split())[:200]}); free space") from error
        raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write the result ({' '.join(str(error).split())[:200]}); free space") from error
