"""Progress of a job: text that is read, prompts of a file, the text of one answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from recursive_jax.console.tables import clock
from recursive_jax.decoding.requests import Completion, Event


@contextlib.contextmanager
def text_progress(name: str, num_chars: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error for text of about `num_chars`; to be called with finished ones."""
    from tqdm import tqdm

    with tqdm(total=num_chars, desc=name, unit="char", unit_scale=True, delay=3) as bar:
        yield bar.update


@contextlib.contextmanager
def row_progress(name: str, num_rows: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error of process 0 for rows of text; to be called with finished ones."""
    from tqdm import tqdm

    quiet = jax.process_index() != 0
    with tqdm(total=num_rows, desc=name, unit="row", delay=3, disable=quiet) as bar:
        yield bar.update


class PromptProgress:
    """A bar on standard error: prompts done, tokens per second, time left.

    Args:
      limits: `max_new_tokens` of every request, by index.

    Attributes:
      done: finished requests, plus tokens / max_new_tokens of every running request.
    """

    def __init__(self, limits: Mapping[int, int]):
        from tqdm import tqdm

        self._limits, self._counts = limits, dict.fromkeys(limits, 0)
        self.done = 0.0
        self._tokens, self._start, self._shown = 0, time.perf_counter(), 0.0
        self._bar = tqdm(
            total=len(limits),
            disable=jax.process_index() != 0,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} prompts [{elapsed}{postfix}]",
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, event: Event) -> None:
        """Count the new tokens of a request."""
        index, limit, completion = event.index, self._limits[event.index], event.completion
        before, count = self._counts[index], self._counts[index] + len(event.tokens)
        if completion is not None:
            count = len(completion.tokens)  # a stop string may take tokens back
            self._bar.update()
        self._tokens += count - before
        self._counts[index] = count
        self.done += (count / limit if completion is None else 1.0) - before / limit
        if self.seconds - self._shown > 0.2 or self.done == len(self._limits):
            self._refresh()

    def _refresh(self) -> None:
        self._shown = self.seconds
        seconds, total = self.seconds, len(self._limits)
        rates = f"{self._tokens / seconds:,.1f} tok/s"
        if self.done:
            left = seconds * max(total - self.done, 0.0) / self.done
            rates += f", {clock(left)} left"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.refresh()


class PrintedAnswer:
    """One answer, printed on standard output while it is decoded.

    Attributes:
      seconds: from the start to the last event.
    """

    def __init__(self):
        self._start, self.seconds = time.perf_counter(), 0.0
        self._first: float | None = None  # seconds to the first tokens
        self._first_count = 0  # tokens that arrived with the first event

    def add(self, event: Event) -> None:
        """Print the new text."""
        self.seconds = time.perf_counter() - self._start
        if self._first is None and event.tokens:
            self._first, self._first_count = self.seconds, len(event.tokens)
        if jax.process_index() == 0:
            print(event.piece, end="\n" if event.completion else "", flush=True)

    def summary(self, completion: Completion) -> str:
        """One line: tokens, tokens per second after the first event, seconds to the first token."""
        count = len(completion.tokens)
        facts = [f"{count} tokens ({completion.finish_reason})"]
        if count > self._first_count > 0:
            rate = (count - self._first_count) / (self.seconds - self._first)
            facts.append(f"{rate:.1f} tok/s")
        if self._first is not None:
            facts.append(f"first token after {self._first:.2f} s")
        return ", ".join(facts)


class WorkProgress:
    """A bar on standard error for work of which a share is done: elapsed and remaining time.

    Args:
      name: of the work.
      quiet: show nothing.
    """

    def __init__(self, name: str, quiet: bool = False):
        from tqdm import tqdm

        self._bar = tqdm(
            total=1.0,
            desc=name,
            disable=quiet or jax.process_index() != 0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}, {remaining} left]",
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def __call__(self, share: float) -> None:
        """`share`: of the work, in [0, 1]; a smaller one than before begins another part."""
        self._bar.n = min(share, 1.0)
        self._bar.refresh()
