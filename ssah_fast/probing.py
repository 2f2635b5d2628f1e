"""Towards refusal or towards compliance: where a model's hidden states point, layer by layer.

The probe of SSAH (Li & Kim, arXiv 2410.10862): the hidden state at the last token of a query is compared, after every
decoder layer, with the state at the last token of the same query followed by the beginning of a refusal, and by the
beginning of an answer. In an aligned model, harmful queries are nearer to the refusal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah_fast import data, fingerprints
from ssah_fast.calibration import check_sequences
from ssah_fast.data import Encoded
from ssah_fast.errors import NonFiniteError, SsahError, spelled
from ssah_fast.evaluation.intervals import mean, proportion
from ssah_fast.score_plan import default_tokens
from ssah_fast.units import decoder_layers, text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "probe"
SCHEMA = 1
# The openings that the paper shows; what it writes after them ("...") is not known.
REFUSAL = "Sorry, I can't"
COMPLIANCE = "Here's how"

Report = Callable[[int, int], None]


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    refusal: str = REFUSAL,
    compliance: str = COMPLIANCE,
    baseline: bool = False,
    batch_size: int | None = None,
    chat_template: bool = True,
    system: str | None = None,
    argument: str = "prompts",
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure how far the states of queries are from those of queries with a refusal, and with an answer, begun.

    The distance is 1 - cosine, in float64, between states at the last token of a sequence, behind a decoder layer and
    before any final norm. The model runs without its head and cache, two sequences per prompt; the query's own state
    comes from the same pass, as no token sees what follows it.

    Args:
        model: A causal language model of a supported architecture, on the device to run on; left as it was.
        tokenizer: Its tokenizer.
        prompts: The queries, or several sets of them by name; one set alone is called "harmful".
        refusal: What begins a refusal, put directly behind the query (and its generation prompt).
        compliance: What begins an answer.
        baseline: Subtract the query-only baseline from both distances: the mean distance between the states of two
            different queries of the set, each alone, at that layer. It is the scale of distances there; the margin
            does not change. The paper subtracts nothing, and this reading of "baseline" is ours.
        batch_size: Prompts per forward pass; None chooses by length. Changes nothing beyond rounding.
        chat_template: Use the tokenizer's chat template; without, a query ends with a line break.
        system: A system prompt before every query.
        argument: What the error messages call the prompts.
        progress: Called with (prompts done, prompts in all) after every batch.

    Returns:
        {"model": identity, "sets": [{"set", "n", "layers": [...]}]}, where a layer has "layer" (from 0), the means
        over the set's prompts of "refusal" and "compliance" (distances) and "margin" (compliance - refusal: above 0
        is nearer to refusing), "nearer_refusal" (percent of prompts), each with its 95 % interval and n, and
        "baseline" (None for a single prompt).

    Raises:
        SsahError: A set is empty, a text gives no token, the openings are the same, a sequence is longer than the model
            takes, the tokenizer has no chat template or is another model's, or a baseline is asked of a single prompt.
        NonFiniteError: A state has a NaN or an Inf; the message names the layer and the prompt.
    """
    sets = prompts if isinstance(prompts, Mapping) else {"harmful": prompts}
    for name, queries in sets.items():
        if len(queries) < 1 + baseline:
            wanted = "two prompts for a baseline" if baseline else "one prompt"
            raise SsahError(f"{argument}: the set {name!r} has {len(queries)}; give at least {wanted}")
    openings = _openings(tokenizer, refusal, compliance, argument)
    how: dict[str, Any] = {"system": system, "chat_template": chat_template, "argument": argument}
    encoded = {name: data.encode_prompts(queries, tokenizer, **how) for name, queries in sets.items()}
    for name, ids in encoded.items():
        _check_lengths(model, ids, openings, f"{argument}: the set {name!r}")
    done, total, measured = 0, sum(map(len, encoded.values())), []
    for name, ids in encoded.items():
        distances = _Distances(model, len(ids))
        for batch in _batches(ids, openings, batch_size, default_tokens(distances.device)):
            distances.measure(batch)
            done += len(batch.prompts)
            if progress is not None:
                progress(done, total)
        distances.check(f"{argument}: the set {name!r}")
        measured.append({"set": name, "n": len(ids), "layers": distances.layers(baseline)})
    return {"model": fingerprints.identity(model), "sets": measured}


@dataclass(frozen=True)
class _Batch:
    """Some queries, each followed by both openings and padded on the right.

    Attributes:
        prompts: int64 [P], their numbers in the set.
        ids: int64 [2 P, T]: first all of them with the refusal, then all with the compliance.
        mask: int64 [2 P, T], 0 for padding.
        rows: int64 [3, P], the rows that hold the query alone, with refusal and with compliance.
        ends: int64 [3, P], the positions of the last token of each.
    """

    prompts: Tensor
    ids: Tensor
    mask: Tensor
    rows: Tensor
    ends: Tensor

    @classmethod
    def of(cls, prompts: Sequence[int], queries: Sequence[list[int]], openings: Sequence[list[int]]) -> _Batch:
        sequences = [torch.tensor(queries[i] + opening) for opening in openings for i in prompts]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        # Any token pads, as padding is masked and no token sees what follows it; token 0 is in every vocabulary.
        ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).to(torch.int64)
        row = torch.arange(len(prompts))
        alone = torch.tensor([len(queries[i]) for i in prompts])
        return cls(
            torch.tensor(prompts),
            ids,
            mask,
            torch.stack([row, row, row + len(prompts)]),
            torch.cat([alone, lengths]).view(3, -1) - 1,
        )


def _batches(
    queries: Sequence[list[int]], openings: Sequence[list[int]], size: int | None, tokens: int
) -> Iterator[_Batch]:
    """Longest first, `size` prompts at a time, or as many as have at most `tokens` tokens with padding."""
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]), reverse=True)
    while order:
        longest = len(queries[order[0]]) + max(map(len, openings))
        count = size or max(1, tokens // (len(openings) * longest))
        yield _Batch.of(order[:count], queries, openings)
        order = order[count:]


class _Distances:
    """Runs batches and keeps two numbers per prompt and layer, and one direction per layer."""

    def __init__(self, model: PreTrainedModel, prompts: int) -> None:
        self._decoder = text_decoder(model)
        self._layers = decoder_layers(model)[1]
        self.device = self._decoder.get_input_embeddings().weight.device
        self._distance = torch.zeros(2, len(self._layers), prompts, dtype=torch.float64)
        self._sum: list[Tensor] = [torch.zeros(())] * len(self._layers)

    def measure(self, batch: _Batch) -> None:
        """Run a batch and take its distances."""
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for number, layer in enumerate(self._layers):
                handle = layer.register_forward_hook(self._look(number, batch))
                hooks.callback(handle.remove)
            self._decoder(
                input_ids=batch.ids.to(self.device), attention_mask=batch.mask.to(self.device), use_cache=False
            )

    def _look(self, number: int, batch: _Batch) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states = hidden[batch.rows.to(hidden.device), batch.ends.to(hidden.device)].double()
            directions = states / states.norm(dim=-1, keepdim=True)
            # |u - v|^2 / 2 is 1 - cos without the cancellation: exactly 0 for equal states.
            distance = (directions[1:] - directions[0]).square().sum(-1) / 2
            self._distance[:, number, batch.prompts] = distance.cpu()
            self._sum[number] = self._sum[number] + directions[0].sum(0).cpu()

        return look

    def check(self, what: str) -> None:
        """Refuse states that have no direction.

        Raises:
            NonFiniteError: There is one.
        """
        odd = (~self._distance.isfinite()).any(0).nonzero()
        if len(odd):
            layer, prompt = odd[0].tolist()
            raise NonFiniteError(
                f"{what}: the hidden state behind layer {layer} is NaN, infinite or zero for prompt {prompt + 1}; "
                "use --dtype fp32 or bf16, or check the weights"
            )

    def layers(self, subtract: bool) -> list[dict[str, Any]]:
        """The figures of every layer."""
        return [self._figures(layer, subtract) for layer in range(len(self._layers))]

    def _figures(self, layer: int, subtract: bool) -> dict[str, Any]:
        refusal, compliance = self._distance[:, layer]
        baseline = self._baseline(layer)
        offset = baseline if subtract and baseline is not None else 0.0
        return {
            "layer": layer,
            **mean((refusal - offset).tolist()).flat("refusal"),
            **mean((compliance - offset).tolist()).flat("compliance"),
            **mean((compliance - refusal).tolist()).flat("margin"),
            **proportion(int((refusal < compliance).sum()), len(refusal)).flat("nearer_refusal"),
            "baseline": baseline,
        }

    def _baseline(self, layer: int) -> float | None:
        """Mean of 1 - u_i . u_j over all pairs i != j of directions, from their sum: sum u_i . u_j = |sum u|^2 - n."""
        n = self._distance.shape[-1]
        if n < 2:
            return None
        return 1 - (float(self._sum[layer].square().sum()) - n) / (n * (n - 1))


def _openings(tokenizer: PreTrainedTokenizerBase, refusal: str, compliance: str, argument: str) -> list[list[int]]:
    """The tokens of both texts, which are tokenised apart from the query, as responses are in `data.encode`."""
    if refusal == compliance:
        names = " and ".join(spelled(name, argument) for name in ("refusal", "compliance"))
        raise SsahError(f"{names} are both {refusal!r}; give two different texts")
    found = []
    for name, text in (("refusal", refusal), ("compliance", compliance)):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise SsahError(f"{spelled(name, argument)} {text!r} gives no token; give a text that the tokenizer knows")
        if tokenizer.unk_token_id in ids:
            raise SsahError(
                f"{spelled(name, argument)} {text!r} has words that the tokenizer does not know; choose others"
            )
        found.append(ids)
    return found


def _check_lengths(
    model: PreTrainedModel, queries: Sequence[list[int]], openings: Sequence[list[int]], what: str
) -> None:
    """Refuse what the model cannot run, with the number of the prompt."""
    empty = next((number for number, ids in enumerate(queries, start=1) if not ids), None)
    if empty is not None:
        raise SsahError(f"{what}: prompt {empty} gives no token; leave it out")
    positions = data.positions(model)
    lengths = [len(ids) + max(map(len, openings)) for ids in queries]
    if positions is not None and max(lengths) > positions:
        prompt = lengths.index(max(lengths)) + 1
        raise SsahError(
            f"{what}: prompt {prompt} has {max(lengths)} tokens with its opening, but the model has {positions} "
            "positions; leave it out"
        )
    check_sequences(model, [Encoded(ids, []) for ids in (*queries, *openings)], what)
