"""Answering the prompts of a file, or one prompt, with an engine; answers are kept as they come."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence

from recursive_jax import sharding
from recursive_jax.console.output import note
from recursive_jax.console.progress import PrintedAnswer, PromptProgress
from recursive_jax.decoding import answers as answers_lib
from recursive_jax.decoding.answers import Answers
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.engine import Engine
from recursive_jax.decoding.prompts import Prompt, to_request
from recursive_jax.decoding.requests import Completion, Request
from recursive_jax.decoding.session import Session
from recursive_jax.model import Model


@dataclasses.dataclass
class Item:
    """One prompt of the run with its request and answer.

    Attributes:
      place: of the answer in the file.
      request: None while the prompt is not tokenized, and when it cannot be answered.
      completion: None while the answer is not complete.
      kept: whether an interrupted run made the completion.
    """

    place: int
    prompt: Prompt
    request: Request | None = None
    completion: Completion | None = None
    kept: bool = False

    def fail(self, error: object, answers: Answers) -> None:
        """Write that the prompt cannot be answered."""
        self.request = None
        self.finish(Completion.failed(self.prompt.id, error), answers)

    def finish(self, completion: Completion, answers: Answers) -> None:
        """Write the answer."""
        self.completion = completion
        answers.add(self.place, completion, self.request is not None and self.request.logprobs)


def make_requests(
    model: Model,
    config: EngineConfig,
    items: Sequence[Item],
    answers: Answers,
    chat: bool,
    dtype: str,
    one: bool,
) -> list[Request]:
    """Tokenize the prompts; returns the requests that have no answer yet.

    A prompt that cannot be answered gets its completion here, and so does one that an interrupted
    run of the same command has answered.

    Args:
      model, config: answers depend on them.
      items: the prompts.
      answers: of this run; OUT.part may have those of an interrupted one.
      chat: apply the chat template to texts too.
      dtype: name of the compute dtype.
      one: there is one prompt and no file: nothing is resumed, and a bad prompt raises.

    Raises:
      ValueError: no prompt can be answered.
    """
    longest = model.cfg.max_length
    context_length = config.context_length or longest
    if context_length > longest:
        note(f"warning: the model was trained on at most {longest} positions")
    sizes = model.cfg.vocab_size, model.stop, context_length, chat
    failed: list[tuple[Item, ValueError]] = []
    for item in items:
        try:
            item.request = to_request(item.prompt, model.tokenizer, *sizes)
        except ValueError as error:
            if one:
                raise
            failed.append((item, error))
    if not one:
        _take_finished(model, config, items, answers, dtype)
    for item, error in failed:
        item.fail(error, answers)
    check_any_left(items, answers)
    return [item.request for item in items if item.completion is None]


def _take_finished(
    model: Model, config: EngineConfig, items: Sequence[Item], answers: Answers, dtype: str
) -> None:
    """Take the answers that an interrupted run of the same command left in OUT.part."""
    settings = config.measure, config.thresholds, config.missing_kv, config.lossless
    run = repr((model.cfg, model.weights.content(), dtype, settings))
    requests = [(item.place, item.request) for item in items if item.request]
    digests = {r.id: (place, answers_lib.digest(r, run)) for place, r in requests}
    kept = answers.resume(digests, note)
    sharding.check_agreement("the number of answers in OUT.part", len(kept))
    for place, completion in kept.items():
        items[place].completion, items[place].kept = completion, True


def check_any_left(items: list[Item], answers: Answers) -> None:
    """Raise ValueError if no request can be answered."""
    if not any(item.request for item in items):
        answers.close()
        first = items[0].completion.error
        raise ValueError(f"none of {len(items)} prompts can be answered. The first: {first}")


def answer_one(session: Session, engine: Engine, item: Item, answers: Answers) -> float:
    """Print the answer while it is decoded; returns seconds."""
    session.submit(item.request)
    printed = PrintedAnswer()
    for event in session.events(max_ticks=engine.num_loops):  # about one token per round trip
        printed.add(event)
        if event.completion:
            item.finish(event.completion, answers)
    if item.completion.error:
        raise ValueError(item.completion.error)
    note(printed.summary(item.completion))
    return printed.seconds


def answer_all(session: Session, items: list[Item], answers: Answers) -> float:
    """Answer the requests that have no answer yet, behind a progress bar; returns seconds."""
    running: dict[int, Item] = {}
    for item in items:
        if item.completion is None:
            try:
                running[session.submit(item.request)] = item
            except ValueError as error:
                item.fail(f"{item.prompt.where}{error}", answers)
    check_any_left(items, answers)
    limits = {index: item.request.max_new_tokens for index, item in running.items()}
    with PromptProgress(limits) as progress:
        for event in session.events():
            progress.add(event)
            if event.completion:
                running[event.index].finish(event.completion, answers)
        return progress.seconds


def stopped(out: str | None, arguments: Sequence[str]) -> str:
    """What a signal left of a run that writes to `out`, and the command to go on."""
    if not out:
        return "stopped"
    part = Answers(out, write=False).part
    if not part.exists():
        return f"stopped; answers: {out}" if os.path.exists(out) else "stopped"
    command = shlex.join(["python", "-m", "recursive_jax.generate", *arguments])
    count = answers_lib.count_answers(part)
    return f"stopped; finished answers: {count:,} in {part}. To go on:\n{command}"
