"""Benchmarks of lm-evaluation-harness, on a model in memory."""

import contextlib
import functools
import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssah_fast.errors import SsahError
from ssah_fast.evaluation import intervals
from ssah_fast.evaluation.intervals import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 8
_ACCURACIES = ("acc", "exact_match")  # the first that a task has is its accuracy
# What a task raises whose data cannot be had, or whose file is wrong; datasets' own errors are among these.
_CANNOT_RUN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)


def run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    include_path: Sequence[str] = (),
    use_cache: str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: A causal language model in evaluation mode, on the device to run on.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups or tags; "*" stands for anything.
        limit: At most so many questions of each task; a number below 1 is a share of them.
        num_fewshot: Examples before each question; None: what the task says.
        batch_size: None: 8.
        seed: Of the draw of the examples.
        include_path: Further folders with task files.
        use_cache: Beginning of the name of a database of answers, from which a killed run goes on.
        log_samples: Whether to return every question and answer, too.

    Returns:
        "mean": the mean accuracy in percent over `tasks`, None if one of them has none; "tasks": per task its accuracy
        in percent with a 95 % interval, all its metrics as lm-evaluation-harness gives them (parts of one) and their
        standard errors, its version and number of examples; with log_samples "samples": per task a list.

    Raises:
        SsahError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    harness = _harness()
    manager = _manager(tuple(tasks), tuple(include_path))
    with _quiet():
        try:
            adapter = harness.models.huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size or BATCH_SIZE
            )
            results = harness.simple_evaluate(
                adapter,
                tasks=[*tasks],
                limit=limit if limit is None or limit < 1 else int(limit),
                num_fewshot=num_fewshot,
                task_manager=manager,
                use_cache=use_cache,
                log_samples=log_samples,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except _CANNOT_RUN as error:
            reason = " ".join(str(error).split())
            raise SsahError(f"--tasks {','.join(tasks)}: cannot be run ({type(error).__name__}: {reason})") from error
    return _document(results, tasks) | ({"samples": results["samples"]} if log_samples else {})


def check(tasks: Sequence[str], include_path: Sequence[str] = ()) -> None:
    """Refuse tasks that cannot be run, before anything is.

    Raises:
        SsahError: lm-eval is not installed, or a task is unknown.
    """
    _harness()
    _manager(tuple(tasks), tuple(include_path))


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise SsahError(f"--tasks needs {error.name}; install it with: pip install 'ssah_fast[eval]'") from error
    return lm_eval


@functools.lru_cache(maxsize=1)
def _manager(tasks: tuple[str, ...], include_path: tuple[str, ...]) -> Any:
    """A task manager that knows all of `tasks`; reads the thousands of lm-eval (19 s) only if it must, and once."""
    paths = [*include_path]
    make = _harness().tasks.TaskManager
    with _quiet():
        managers = (make(include_path=paths, include_defaults=defaults) for defaults in (False, True)[not paths :])
        for manager in managers:
            unknown = [task for task in tasks if not manager.match_tasks([task])]
            if not unknown:
                return manager
    folders = f" and {', '.join(paths)}" if paths else ""
    raise SsahError(
        f"--tasks {unknown[0]}: no such task in lm-eval{folders}; `lm-eval ls tasks` lists them, --include-path adds "
        "folders"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval from logging, and from drawing its bars where stderr is no terminal."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(before)


def _document(results: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    tasks = {name: _task(name, results) for name in results["results"]}
    names = [name for name in asked if name in tasks] or [*tasks]  # a tag is not among the results, its tasks are
    accuracies = [tasks[name]["acc"] for name in names if "acc" in tasks[name]]
    complete = names and len(accuracies) == len(names)
    return {"mean": sum(accuracies) / len(accuracies) if complete else None, "tasks": tasks}


def _task(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    figures = {key: _finite(value) for key, value in results["results"][name].items() if "," in key}
    accuracy = _accuracy(figures, _questions(name, results))
    return {
        **(accuracy.flat("acc") if accuracy else {}),
        "metrics": figures,
        "version": results["versions"].get(name),
        "num_fewshot": results["n-shot"].get(name),
    }


def _questions(name: str, results: Mapping[str, Any]) -> int:
    """How many questions a task, or a group with all its tasks, has asked."""
    counts = results["n-samples"]
    if name in counts:
        return int(counts[name]["effective"])
    return sum(_questions(member, results) for member in results["group_subtasks"].get(name) or [])


def _accuracy(figures: Mapping[str, float | None], n: int) -> Interval | None:
    for metric in _ACCURACIES:
        for key, value in figures.items():
            if key.startswith(f"{metric},") and value is not None and n:
                error = figures.get(key.replace(metric, f"{metric}_stderr", 1))
                return _interval(value, error, n)
    return None


def _interval(value: float, error: float | None, n: int) -> Interval:
    """In percent: of right and wrong answers Wilson's, of a mean over tasks that from lm-eval's standard error."""
    right = round(value * n)
    if math.isclose(value * n, right, abs_tol=1e-6):
        return intervals.proportion(right, n)
    half = math.nan if error is None else 196 * error
    return Interval(100 * value, 100 * value - half, 100 * value + half, n)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
