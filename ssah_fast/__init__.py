"""ssah_fast: find the few neurons that carry a model's safety and keep them while the rest learns.

Everything public is reachable from here and is imported on first use: ``import ssah_fast`` starts neither torch nor
triton.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if importlib.util.find_spec("ssah_fast.kernels") is None:
    # A regular install plus `python -m ...` inside the checkout imports the source folder, which lacks kernels and cli.
    raise ImportError(
        "ssah_fast was imported from its source folder instead of the installed package. "
        "Run from another folder, use `python -P`, or install with `pip install -e .`."
    )

if TYPE_CHECKING:
    from ssah_fast import data, ops
    from ssah_fast.ablation import ablate
    from ssah_fast.attribute_transfer import transfer
    from ssah_fast.basin import visage
    from ssah_fast.compaction import compact, sync, uncompact
    from ssah_fast.errors import SsahError
    from ssah_fast.evaluation.evaluate import evaluate
    from ssah_fast.landscapes import landscape
    from ssah_fast.masks import Mask, Region
    from ssah_fast.optim import MaskedAdamW, clip_grad_norm_, trainer_kwargs
    from ssah_fast.partition import Category, Units, identify
    from ssah_fast.probing import probe
    from ssah_fast.report import write_report
    from ssah_fast.scores import Scores
    from ssah_fast.scoring import score, score_checkpoint
    from ssah_fast.terrain import make_terrain
    from ssah_fast.training import finetune
    from ssah_fast.units import find_units
    from ssah_fast.verification import Certificate, verify

# public name -> the module that defines it ("" = the module itself is the public name)
_PUBLIC = {
    "Category": "partition",
    "Certificate": "verification",
    "Mask": "masks",
    "MaskedAdamW": "optim",
    "Region": "masks",
    "Scores": "scores",
    "SsahError": "errors",
    "Units": "partition",
    "ablate": "ablation",
    "clip_grad_norm_": "optim",
    "compact": "compaction",
    "data": "",
    "evaluate": "evaluation.evaluate",
    "find_units": "units",
    "finetune": "training",
    "identify": "partition",
    "landscape": "landscapes",
    "make_terrain": "terrain",
    "ops": "",
    "probe": "probing",
    "score": "scoring",
    "score_checkpoint": "scoring",
    "sync": "compaction",
    "trainer_kwargs": "optim",
    "transfer": "attribute_transfer",
    "uncompact": "compaction",
    "verify": "verification",
    "visage": "basin",
    "write_report": "report",
}
__all__ = [
    "Category",
    "Certificate",
    "Mask",
    "MaskedAdamW",
    "Region",
    "Scores",
    "SsahError",
    "Units",
    "ablate",
    "clip_grad_norm_",
    "compact",
    "data",
    "evaluate",
    "find_units",
    "finetune",
    "identify",
    "landscape",
    "make_terrain",
    "ops",
    "probe",
    "score",
    "score_checkpoint",
    "sync",
    "trainer_kwargs",
    "transfer",
    "uncompact",
    "verify",
    "visage",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ssah_fast' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = _PUBLIC[name]
    module = importlib.import_module(f"ssah_fast.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
