"""Our models in the LM Evaluation Harness (lm-eval).

lm-eval has no plug-ins: importing this module registers the model, and our own job calls lm-eval.
Scores equal those of lm-eval's `hf` model. What that takes:

1. A context and its continuation are tokenised as one text, then split. Spaces between them belong
   to the continuation (lm-eval's `TemplateLM`).
2. The prefix of an empty context is BOS, or EOS in a tokenizer without BOS.
3. A text that begins with the prefix gets no second one.
4. Rolling likelihoods use disjoint windows behind one token of context, and a last window with as
   much context as fits (`rolling`).
5. The longest context is that of the model's config.
6. A context that is too long is cut from the left: `max_length + 1` tokens with its continuation.
7. Log-probabilities are computed in float32.

This module imports lm-eval, so it is imported where tasks are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from recursive_jax import text
from recursive_jax.evaluation import rolling, tasks
from recursive_jax.evaluation.encoding import Encoder
from recursive_jax.evaluation.likelihood import Likelihoods, Pair, Score
from recursive_jax.evaluation.loops import loop_report
from recursive_jax.evaluation.records import Records, key, recorded_scores

# (ids of a context, lm-eval's generation arguments) of every prompt -> (number, text) as they end
Generate = Callable[[Sequence[tuple[list[int], dict[str, Any]]]], Iterable[tuple[int, str]]]
MAX_NEW_TOKENS = 256  # lm-eval's default


@register_model("recursive_jax")
class RecursiveLM(TemplateLM):
    """A model of ours, as lm-eval calls it.

    Args:
      tokenizer: of transformers.
      vocab_size: of the model.
      max_length: tokens of a context, at most.
      likelihoods: scores pairs of ids.
      generate: answers prompts; None refuses tasks that generate.
      records: results so far, and where new ones are kept.
      progress: shows the share of the work that is done, in [0, 1].

    Attributes:
      loop: answer as the model does after this exit: an index of `Score`; -1, the last loop.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_length: int,
        likelihoods: Likelihoods,
        generate: Generate | None = None,
        records: Records | None = None,
        progress: Callable[[float], None] = float,
    ):
        super().__init__()
        self.tokenizer, self.max_length, self.loop = tokenizer, max_length, -1
        self._likelihoods, self._generate = likelihoods, generate
        self._records = Records() if records is None else records
        self._progress = progress
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._encoder = Encoder(tokenizer, vocab_size)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """lm-eval's way from a name to a model.

        Raises:
          ValueError: always; lm-eval takes the model itself.
        """
        raise ValueError(
            f"model='recursive_jax' with {arg_dict}: give lm-eval the model itself, as "
            "simple_evaluate(model=recursive_jax.load(NAME).harness())"
        )

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._encoder.prefix

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return text.fingerprint(self.tokenizer)

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._encoder.encode(string, add_special_tokens)

    def _encode_pair(self, context, continuation):
        pair = context, continuation
        if pair not in self._encoded:  # the same requests come once for every loop
            self._encoded[pair] = super()._encode_pair(context, continuation)
        return self._encoded[pair]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        scores = self.scores([(context, continuation) for _, context, continuation in requests])
        return [(score.loglikelihood[self.loop], score.greedy[self.loop]) for score in scores]

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        documents = [
            rolling.windows(self.tok_encode(r.args[0]), self.prefix_token_id, self.max_length)
            for r in requests
        ]
        scores = iter(self.scores([pair for pairs in documents for pair in pairs]))
        return [sum(next(scores).loglikelihood[self.loop] for _ in pairs) for pairs in documents]

    def scores(self, pairs: Sequence[Pair]) -> list[Score]:
        """The scores of pairs of ids; see `records.recorded_scores`."""
        return recorded_scores(self._likelihoods, pairs, self._records, self._progress)

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        if self._generate is None:
            raise ValueError("these tasks generate texts, which this model was not set up for")
        prompts = [(self.tok_encode(context), options) for context, options in map(_args, requests)]
        names = [key("generate", ids, options) for ids, options in prompts]
        missing = {name: n for n, name in enumerate(names) if name not in self._records}
        order = list(missing.values())
        if order:
            for count, (k, answer) in enumerate(self._generate([prompts[n] for n in order]), 1):
                self._records.add([(names[order[k]], answer)])
                self._progress(count / len(order))
        return [self._records[name] for name in names]


def answers(
    model: Any, loaded: dict[str, Any], limit: int | None = None
) -> dict[str, list[list[tuple[float, bool]]]]:
    """What a model answers for every choice of every item, by task; to compare two models."""
    with tasks.quiet():
        result = evaluator.evaluate(
            model, {"tasks": loaded, "groups": {}}, limit=limit, bootstrap_iters=0
        )
    return {
        name: [[answer for (answer,) in sample["resps"]] for sample in samples]
        for name, samples in result["samples"].items()
    }


def _args(request: Any) -> tuple[str, dict[str, Any]]:
    return request.args


def run(
    model: RecursiveLM, loaded: dict[str, Any], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """The report of every task; see `_report`.

    Args:
      model: its answers after every loop are measured, where it has several.
      loaded: tasks by name, as `tasks.load_tasks` returns them.
      limit: items of every task, at most.
    """
    exits = range(model._likelihoods.num_exits)
    samples: dict[str, list[list[dict]]] = {name: [] for name in loaded}
    found: dict[str, list[dict]] = {name: [] for name in loaded}
    for loop in [exits[-1], *exits[:-1]]:  # the first pass computes, the others read
        model.loop = loop
        generating = {n for n, t in loaded.items() if t.OUTPUT_TYPE == "generate_until"}
        chosen = {n: t for n, t in loaded.items() if loop == exits[-1] or n not in generating}
        if not chosen:
            continue
        with tasks.quiet():
            result = evaluator.evaluate(
                model, {"tasks": chosen, "groups": {}}, limit=limit, bootstrap_iters=0
            )
        for name in chosen:
            samples[name].append(result["samples"][name])
            found[name].append(result["results"][name])
    model.loop = -1
    order = [*range(1, len(exits)), 0]  # by loops executed
    out = {}
    for name, task in loaded.items():
        passes = order if len(samples[name]) == len(exits) else [0]
        by_exit = [(found[name][n], samples[name][n]) for n in passes]
        out[name] = _report(task, by_exit)
    return out


def _report(task: Any, by_exit: Sequence[tuple[dict, list[dict]]]) -> dict[str, Any]:
    """Numbers of a task.

    Args:
      task: lm-eval's.
      by_exit: lm-eval's results and samples, by loops executed.

    Returns:
      `items`; `metric`: the one the paper reports, its `value` and `stderr`; `metrics`: value and
      stderr of each. With several loops also `loops`, the metrics after each, and `rates`, the
      `loop_report`.
    """
    measured = [_metrics(task, results, samples) for results, samples in by_exit]
    name = tasks.headline(list(measured[-1]))
    right = np.array([_values(samples, name) or [] for _, samples in by_exit])
    out = {"items": len({sample["doc_id"] for sample in by_exit[-1][1]}), "metric": name}
    out |= measured[-1][name] | {"metrics": measured[-1]}
    if len(by_exit) > 1:
        out["loops"] = measured
        if right.size and np.isin(right, (0, 1)).all():
            out["rates"] = loop_report(right > 0)
    return out


def _metrics(task: Any, results: dict, samples: list[dict]) -> dict[str, dict[str, Any]]:
    found = {}
    aggregations = task.aggregation()
    for label, value in results.items():
        name, comma, filtered = label.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = name if filtered == "none" else label
        values, error = _values(samples, label), None
        if values is not None and len(values) > 1:
            deviation = float(np.std(values, ddof=1)) / len(values) ** 0.5
            if aggregations.get(name) is mean:
                error = deviation
            elif aggregations.get(name) is perplexity:  # exp(-mean): the delta method
                error = deviation * float(value)
        found[label] = {"value": float(value), "stderr": error}
    return found


def _values(samples: list[dict], label: str) -> list[float] | None:
    """A metric of every item, if it is one number for each.

    `label`: 'METRIC', or 'METRIC,FILTER' where a task reads answers through several filters.
    """
    name, _, filtered = label.partition(",")
    mine = (sample for sample in samples if sample.get("filter", "none") == (filtered or "none"))
    values = [sample.get(name) for sample in mine]
    return values if all(isinstance(x, int | float) for x in values) else None
