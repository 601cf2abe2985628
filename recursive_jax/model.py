"""A model: opened by name, converted, trained, decoded with, measured and saved.

    source = load("tiny")
    model = source.convert(num_loops=2, lora_rank=16).train("docstrings:2", teacher=source)
    model.generate(["Return a new"])[0].text

The jobs and notebooks call the same methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from recursive_jax import conversion, files, generation, paths, sharding, text
from recursive_jax.console.output import note
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.exit_measures import Measure
from recursive_jax.decoding.requests import Completion, Event, shown
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.model_measures import Measures, one_of
from recursive_jax.models.config import DecoderConfig
from recursive_jax.training.config import TrainConfig
from recursive_jax.weights import checkpoint, tying, workdir_lock
from recursive_jax.weights.integrity import together
from recursive_jax.weights.source import open_source
from recursive_jax.weights.stored import (
    ArrayWeights,
    CheckpointWeights,
    SourceWeights,
    Weights,
    on_one_device,
)
from recursive_jax.weights.tie_config import TieConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Model(Measures):
    """All about a model. Its weights are read when they are needed, and never changed.

    Attributes:
      cfg: sizes and structure.
      tokenizer: of transformers.
      weights: where they are.
      name: of its file or directory, or how it was made, in words.
      facts: JSON: where the model comes from (source, tying, generation_config).
      certificate: what its conversion preserved; None if it was not converted.
      thresholds: calibrated thresholds of early exits, None without.
    """

    cfg: DecoderConfig
    tokenizer: Any
    weights: Weights
    name: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    thresholds: Thresholds | None = None
    _placed: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _engines: dict[EngineConfig, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    @functools.cached_property
    def params(self) -> Any:
        """Nested float32 params on the default device. Read once, then kept."""
        return self.weights.read(on_one_device(self.cfg), jnp.float32)

    @functools.cached_property
    def stop(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        return text.stop_ids(self.tokenizer, self.facts.get("generation_config"))

    def convert(
        self,
        how: TieConfig | None = None,
        *,
        text: str | None = None,
        text_tokens: int = 2048,
        context_length: int = 512,
        scratch: str | os.PathLike | None = None,
        spectra: bool = False,
        quiet: bool = False,
        **options: Any,
    ) -> Model:
        """The relaxed recursive model of a vanilla one, with its `certificate`.

        Args:
          how: of the conversion; or give fields of `TieConfig` by name. By default the shared
            weights and the LoRAs are fitted on calibration text (`lora_init="joint"`). The moments
            of that text are cached in the user's cache directory.
          text: to measure the certificate on (see `text.documents`); None measures nothing. With a
            text, the full-rank identity is proved too.
          text_tokens: scored tokens of it.
          context_length: tokens per window.
          scratch: directory for the source's log-probabilities, 4 bytes for each scored token and
            id; None: the system's, which may be in memory.
          spectra: the certificate of a calibrated conversion also has what each further rank of a
            projection's LoRAs gains (`weights.rank_budget`). A `lora_budget` needs them anyway.
          quiet: show no progress bar.

        Raises:
          ValueError: an impossible conversion, or a model that is recursive already.
        """
        how = one_of("how", how, TieConfig, options)
        params, cfg, certificate = conversion.convert(
            self, how, text, text_tokens, context_length, scratch, spectra, quiet
        )
        facts = self.facts | {"tying": how.to_json()}
        name = f"{self.name}, tied"
        return Model(cfg, self.tokenizer, ArrayWeights(params, name), name, facts, certificate)

    def untie(self) -> Model:
        """The vanilla model with the same logits: loops unrolled, LoRAs merged."""
        params, cfg = tying.untie(self.params, self.cfg)
        facts = {k: v for k, v in self.facts.items() if k != "tying"}
        name = f"{self.name}, untied"
        return Model(cfg, self.tokenizer, ArrayWeights(params, name), name, facts)

    def train(
        self,
        train_text: str | os.PathLike | None = None,
        config: TrainConfig | None = None,
        *,
        teacher: Model | None = None,
        workdir: str | os.PathLike | None = None,
        quiet: bool = False,
        **changes: Any,
    ) -> Model:
        """The trained model; this one stays as it is.

        Args:
          train_text: files, directories, tfds:NAME or docstrings[:N]; None: that of `config`.
          config: settings; None: the defaults, with distillation if there is a teacher.
          teacher: vanilla model to distil from, usually the source.
          workdir: for checkpoints and metrics. A run that it has goes on. None writes nothing.
            Ctrl-C saves behind the running step, then raises KeyboardInterrupt; the same call goes
            on from there. A second Ctrl-C stops at once. A handler of the caller's own stays.
          quiet: print nothing.
          changes: settings by name, such as `tokens=100_000` or `learning_rate=1e-3`.

        Raises:
          ValueError: an impossible setting; FloatingPointError: the loss is not finite.
        """
        from recursive_jax.fit import fit, make_mesh, plan_step
        from recursive_jax.teaching import open_draws
        from recursive_jax.training.corpus import open_corpus
        from recursive_jax.training.loop import Stop

        if not isinstance(teacher, Model | None):
            raise ValueError(f"teacher={shown(teacher)}; expected a Model, as load(...) returns")
        if config is None:
            config = TrainConfig().with_changes(kd=0.0 if teacher is None else 1.0)
        if not isinstance(config, TrainConfig):
            raise ValueError(f"config={shown(config)}; expected a TrainConfig")
        if train_text is not None:
            changes["train"] = os.fspath(train_text)
        config = config.with_changes(**changes)
        if teacher is not None and not config.objective.kd:
            raise ValueError("a teacher with kd=0 would teach nothing; leave it out, or set kd > 0")
        if workdir is not None:
            workdir = paths.path_of(workdir)
        plan_step(self, config, teacher, make_mesh(config))  # refused before any text is read
        sizes = self.cfg.vocab_size, config.seed
        corpus = open_corpus(config.data, self.tokenizer, *sizes, progress=not quiet)
        corpus = open_draws(config, corpus, self, teacher, progress=not quiet)
        with contextlib.ExitStack() as stack:
            if workdir is not None:
                stack.enter_context(workdir_lock.hold(workdir, note))
                begun = {"start": self.weights.content()}
                begun["teacher"] = None if teacher is None else teacher.weights.content()
                together(functools.partial(self._check_run, workdir, begun))
            is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            handled = (signal.SIGINT,) if workdir is not None and is_default else ()
            stop = stack.enter_context(Stop(str if quiet else note, handled))
            # No name refers to the model while it trains: if the caller has none either, the arrays
            # that it starts from are freed.
            after = dataclasses.replace(self, weights=None, thresholds=None)
            start = [self if workdir is None else self._with_facts(begun=begun)]
            del self
            end = fit(start.pop(), config, corpus, teacher, workdir, stop, quiet)
        if end.stopped or stop.requested:
            step = end.summary["steps"]
            kind = KeyboardInterrupt if stop.requested else InterruptedError  # in another process
            raise kind(f"stopped at step {step} and saved; call again to go on")
        name = f"{after.name}, trained on {end.summary['tokens']:,} tokens"
        weights = ArrayWeights(end.trainer.state.weights, name)
        return dataclasses.replace(after, weights=weights, name=name)

    def _with_facts(self, **more: Any) -> Model:
        return dataclasses.replace(self, facts=self.facts | more)

    def _check_run(self, workdir: str | os.PathLike, begun: dict[str, Any]) -> None:
        """Raise ValueError if `workdir` has a run of another model, or files of other programs."""
        if checkpoint.latest_step(workdir) is None:
            checkpoint.check_ours(workdir)
            return
        cfg, facts = checkpoint.load_config(workdir, note)
        compared = [("sizes", cfg, self.cfg)]
        tyings = (x.get("tying") for x in (facts, self.facts))  # an older one lacks new options
        tyings = (tying and TieConfig.from_json(tying).to_json() for tying in tyings)
        compared.append(("conversion", *tyings))
        if "begun" in facts:
            compared.append(("start or teacher", facts["begun"], begun))
        else:  # a run of the job, which names its source
            compared.append(("source", facts.get("source"), self.facts.get("source")))
        for what, there, here in compared:
            if there != here:
                raise ValueError(
                    f"{workdir} holds a run of another model: its {what} is {there}, now {here}. "
                    "Give another workdir"
                )

    def generate(
        self,
        prompts: generation.Prompts,
        *,
        exits: Measure | None = None,
        engine: EngineConfig | None = None,
        chat: bool = False,
        dtype: str = "auto",
        **options: Any,
    ) -> list[Completion]:
        """The answers to prompts, in order; a prompt that fails has finish_reason 'error'.

        Args:
          prompts: a text, or a list of texts, conversations and `Request`s.
          exits: which tokens leave early, such as `TopProbability(0.9)`; None: as `engine` says. A
            measure without a threshold takes that of `thresholds`, if they are for it.
          engine: sizes and exits of the engine; None: the defaults.
          chat: apply the chat template to texts too.
          dtype: compute dtype.
          options: for all prompts that are no `Request`s: `max_new_tokens` (default 128),
            `temperature`, `seed`, `stop`, and the others of `decoding.prompts.OPTIONS`.

        Raises:
          ValueError: a bad setting, or a prompt that cannot be answered.
        """
        events = self.stream(
            prompts, exits=exits, engine=engine, chat=chat, dtype=dtype, max_ticks=None, **options
        )
        completions = {e.index: e.completion for e in events if e.completion is not None}
        return [completions[index] for index in sorted(completions)]

    def stream(
        self,
        prompts: generation.Prompts,
        *,
        exits: Measure | None = None,
        engine: EngineConfig | None = None,
        chat: bool = False,
        dtype: str = "auto",
        max_ticks: int | None = 4,
        **options: Any,
    ) -> Iterator[Event]:
        """Events as the answers grow: `index` of the prompt, `piece` of text, at last `completion`.

        `max_ticks`: passes of the block between events, at most; other arguments as `generate`.
        A call may end the streams of earlier calls that are not read to their end: reading on from
        such a stream raises ValueError.
        """
        from recursive_jax.decoding.session import stream

        config = EngineConfig() if engine is None else engine
        if not isinstance(config, EngineConfig):
            raise ValueError(f"engine={shown(engine)}; expected an EngineConfig")
        if exits is not None:
            config = dataclasses.replace(config, measure=exits, thresholds=None)
        config.check_loops(self.cfg.num_loops)
        config = generation.with_thresholds(config, self)
        length = config.context_length or self.cfg.max_length
        requests = generation.make_requests(self, prompts, options, length, chat)
        compute = sharding.compute_dtype(dtype)
        if compute.name not in self._placed:
            self._placed.clear()  # one copy of the weights at a time
            self._engines.clear()
            passes = generation.expected_passes(self, requests, config.num_slots)
            self._placed[compute.name] = generation.put_on_devices(
                self, sharding.make_mesh(), compute, generation.needed_context(requests), passes
            )
        placed = self._placed[compute.name]
        config = generation.fit_to(config, requests, placed)
        if config not in self._engines:
            self._engines.clear()  # and one cache
            self._engines[config] = generation.make_engine(placed, config)
        ticks = {} if max_ticks is None else {"max_ticks": max_ticks}
        return stream(self._engines[config], requests, self.tokenizer, **ticks)

    def save(self, directory: str | os.PathLike) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
          ValueError: the directory exists and is not empty.
        """
        out = paths.path_of(directory)
        check_free(out)
        if paths.is_remote(out):  # nothing can be renamed there; Orbax commits the step last
            self._write(out)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as partial:
            made = pathlib.Path(partial) / out.name  # moved to `out` when it is complete
            self._write(made)
            files.put_in_place(made, out)

    def _write(self, directory: Any) -> None:
        """Write a checkpoint into a directory that is new."""
        self.write_description(directory)
        writer = checkpoint.Writer(directory)
        writer.save(0, self.params, wait=True)
        writer.close()
        if self.thresholds is not None and not self.thresholds.stale:
            step, params = checkpoint.params_checksum(directory)
            dataclasses.replace(self.thresholds, step=step, params=params).save(directory)

    def export(
        self,
        out: str | os.PathLike,
        format: str = "hf",
        *,
        layout: str | None = None,
        dtype: str | None = None,
        max_shard_gb: float = 5.0,
    ) -> str:
        """Write the model in a form of other tools, whole or not at all; return how to load it.

        Args:
          out: directory to make; of format 'gguf' a file name.
          format: 'hf', 'gguf', 'orbax' or 'recursive', see docs/export.md.
          layout: of 'hf' and 'gguf': 'unrolled' (default), ordinary layers with the LoRAs merged;
            or 'looped', the shared block stored once, where the model fits that layout.
          dtype: of the stored weights: float32 (default), bfloat16 or float16; of 'gguf' f32
            (default), f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.
          max_shard_gb: size of a safetensors file.

        Raises:
          ValueError: something is there already, or the format cannot express the model.
          OSError: the disk has no room.
        """
        from recursive_jax import exporting

        plan = exporting.plan(self, out, format, layout, dtype, max_shard_gb)
        plan.write()
        return plan.how_to_load

    def write_description(self, directory: str | os.PathLike) -> None:
        """Write all of a checkpoint but its weights: config, tokenizer, certificate."""
        facts = {k: v for k, v in self.facts.items() if k not in ("format", "versions")}
        checkpoint.create(directory, self.cfg, self.tokenizer, **facts)
        if self.certificate is not None:
            path = paths.path_of(directory) / checkpoint.CERTIFICATE
            checkpoint.write_json(path, self.certificate)


def load(
    spec: str | os.PathLike,
    step: int | None = None,
    ema: bool | None = None,
    strict: bool = False,
) -> Model:
    """The model called `spec`; its weights are not read yet.

    Args:
      spec: a checkpoint or an export of ours, a Hugging Face directory, a .gguf file, a hub id, or
        'tiny'.
      step: of a checkpoint; None: the newest now, also if a training saves newer ones later.
      ema: of a checkpoint: its averaged weights, or those that were trained. None: averaged where
        the run keeps them.
      strict: a damaged newest step of a checkpoint is an error. Otherwise it is set aside with a
        warning, and the step before it is used.

    Raises:
      FileNotFoundError, ValueError: not there, not understood, or damaged; by name.
    """
    spec = os.fspath(spec)
    if checkpoint.is_checkpoint(spec):
        cfg, facts = checkpoint.load_config(spec, note)
        if strict and step is None:
            step = checkpoint.latest_step(spec)
        # raises: no readable step, or no averaged weights
        newest, params = checkpoint.params_checksum(spec, step, note, ema)
        tokenizer = text.load_tokenizer(paths.local_copy(paths.path_of(spec) / "tokenizer"))
        certificate = checkpoint.load_certificate(spec)
        thresholds = Thresholds.load(spec)
        if thresholds is not None:
            thresholds = thresholds.compare(newest, params)
        # Another step is no replacement where it was asked for, or where thresholds are for this.
        exact = step is not None or not (thresholds is None or thresholds.stale)
        weights = CheckpointWeights(spec, newest, exact, note, ema)
        name = spec
    else:
        if step is not None:
            raise ValueError(f"step={step} of {spec}, which is no checkpoint of this package")
        if ema is not None:
            raise ValueError(f"ema={ema} of {spec}, which is no checkpoint of this package")
        if paths.is_remote(spec):
            raise FileNotFoundError(
                f"no checkpoint of this package in {spec}; copy a model of another format to this "
                "machine and convert it"
            )
        source = open_source(spec)
        cfg, tokenizer = source.cfg, source.load_tokenizer()
        facts = {"generation_config": source.generation_config, **source.facts}
        if cfg.num_loops == 1:  # a vanilla model is its own source
            facts["source"] = str(source.path)
        weights, thresholds, certificate = SourceWeights(source), None, source.certificate
        name = str(source.path)
    text.check_vocabulary(tokenizer, cfg.vocab_size)
    model = Model(cfg, tokenizer, weights, name, dict(facts), certificate, thresholds)
    _ = model.stop  # raises for a value that is no id
    return model


def check_free(directory: Any) -> None:
    """Raise ValueError unless a checkpoint can be written to `directory`."""
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; choose another directory, or remove it")
