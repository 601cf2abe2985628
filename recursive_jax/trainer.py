"""A training step on a mesh: the sharded state and the compiled step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from recursive_jax import sharding
from recursive_jax.models.parameters import abstract_params, logical_axes
from recursive_jax.training.curriculum import LoopCurriculum
from recursive_jax.training.data import Batch
from recursive_jax.training.draws import Draws
from recursive_jax.training.setup import TrainSetup
from recursive_jax.training.state import TrainState


class Trainer:
    """Runs the steps of a setup on a mesh.

    Args:
      setup: the step.
      mesh: its devices.
      teacher_params: in `teacher_shardings`, in the compute dtype; None without a teacher.
      curriculum: loops of every step; None: all. Each number of them is a program of its own.

    Attributes:
      state: None before `start` or `resume`. Each step donates its arrays.
      rules: logical axis -> mesh axes, for the model of `setup`.
      param_shardings, shardings: of the params, and of the whole state.
      abstract: shapes and dtypes of the state.
      loops: that the latest step ran.
      compiled: the latest step was the first one of its program.
    """

    def __init__(
        self,
        setup: TrainSetup,
        mesh: Mesh,
        teacher_params: Any = None,
        curriculum: LoopCurriculum | None = None,
    ):
        cfg = setup.model.cfg
        self.setup, self.mesh, self.teacher_params = setup, mesh, teacher_params
        self.rules = sharding.rules_for(mesh, cfg)
        self.param_shardings = sharding.shardings(logical_axes(cfg), mesh, self.rules)
        self.abstract = jax.eval_shape(setup.init, abstract_params(cfg))
        self.shardings = sharding.state_shardings(self.abstract, self.param_shardings, mesh)
        self.state: TrainState | None = None
        self._curriculum, self._steps_done = curriculum, 0
        self.loops, self.compiled = cfg.num_loops, False
        self._programs: set[int | None] = set()
        self._init = jax.jit(setup.init, out_shardings=self.shardings)
        self._step = jax.jit(
            setup.step,
            static_argnames="loops",
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )

    def start(self, params: Any) -> None:
        """Begin with float32 params in `param_shardings`, which are copied."""
        self.state, self._steps_done = self._init(params), 0

    def to_restore(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of what a checkpoint stores of the state, by name."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract.saved(),
            self.shardings.saved(),
        )

    def resume(self, arrays: dict[str, Any], step: int) -> None:
        """Go on with the arrays of a checkpoint, in the form of `to_restore`."""
        number = sharding.put_global(np.int32(step), self.shardings.step)
        self.state, self._steps_done = TrainState(step=number, **arrays), step

    def step(self, batch: Batch) -> dict[str, jax.Array]:
        """Do one step; returns its metrics, still on the devices.

        Args:
          batch: numpy rows of this process, `[B / processes, T]`.
        """
        with self.use():
            batch = sharding.put_local_batch(batch, self.mesh)
            loops = self._curriculum and self._curriculum.loops(self._steps_done)
            self.state, metrics = self._step(self.state, batch, self.teacher_params, loops=loops)
        self._steps_done += 1
        self.loops = self.setup.model.cfg.num_loops if loops is None else loops
        self.compiled = loops not in self._programs
        self._programs.add(loops)
        return metrics

    def lower(self, batch_size: int, context_length: int) -> jax.stages.Lowered:
        """The lowered step for a batch of these sizes, without any array.

        Works on a mesh of devices that are only described (`jax.experimental.topologies`).
        """
        place = sharding.batch_sharding(self.mesh)
        dtypes = {"weights": np.float32}
        batch = Batch(
            **{
                name: jax.ShapeDtypeStruct(
                    (batch_size, context_length), dtypes.get(name, np.int32), sharding=place
                )
                for name in ("tokens", "targets", "weights", "positions", "segment_ids")
            }
        )
        if self.setup.draws:
            shape = (batch_size, context_length, self.setup.draws)
            ids, counts, entropy = (
                jax.ShapeDtypeStruct(s, dtype, sharding=place)
                for s, dtype in ((shape, np.int32), (shape, np.uint8), (shape[:2], np.float32))
            )
            batch = batch.replace(teacher=Draws(ids, counts, entropy))
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract,
            self.shardings,
        )
        teacher = None
        if self.setup.teacher is not None:
            model = self.setup.teacher
            teacher = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s),
                abstract_params(model.cfg),
                teacher_shardings(model.cfg, self.mesh),
            )
        with self.use():
            return self._step.lower(state, batch, teacher)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """A context in which functions of the model are traced for this mesh and dtype."""
        precision = sharding.matmul_precision(self.setup.model.dtype)
        with sharding.use(self.mesh, self.rules), precision:
            yield


def teacher_shardings(cfg: Any, mesh: Mesh) -> Any:
    """Shardings of a teacher's params; `cfg` is its `DecoderConfig`."""
    return sharding.shardings(logical_axes(cfg), mesh, sharding.rules_for(mesh, cfg))
