#!/usr/bin/env bash
# Compiles the training step of a config for TPUs that are not here, and shows the memory it takes
# on each chip. Needs the extra [tpu], no TPU, and a few minutes.
#
#   launch/aot.sh v5e:4x4 16 --config=gemma_rrt:paper --config.source=MODEL --config.remat=full …
#
# First the topology (v5e:4x4, v5p:2x2x2, v6e:16x16, …), then the memory of a chip in GB, which the
# compiler does not know, then arguments of `python -m recursive_jax.train`. The source's weights
# are not read. Exit code 3: it does not fit.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
exec "${PYTHON:-python3}" - "$@" <<'EOT'
import sys

from absl import flags
from jax.experimental import topologies

from recursive_jax import sharding, start, train
from recursive_jax.console import config_files
from recursive_jax.fit import attention_of, plan_step
from recursive_jax.model import Model, load
from recursive_jax.trainer import Trainer
from recursive_jax.training.config import TrainConfig

topology, gigabytes, *arguments = sys.argv[1:]
values = flags.FlagValues()
train.define_flags(values)
# config_flags reads values of the config in sys.argv.
sys.argv = config_files.resolve(["train", "--workdir=/nonexistent", *arguments])
values(sys.argv)
config = values.config
if config.dtype == "auto":
    config.dtype = "bfloat16"  # as on TPUs
settings = TrainConfig.from_mapping(config)
source = load(config.source) if config.source else None
begin = start.choose(config, source, values.workdir)
devices = topologies.get_topology_desc(topology, platform="tpu").devices
mesh = sharding.make_mesh(**vars(settings.mesh), devices=devices)
model = Model(begin.cfg, begin.tokenizer, None, begin.origin)
plan = plan_step(model, settings, source, mesh)
print(f"weights: {plan.words}")
print(f"attention: {attention_of(begin.cfg, settings, mesh)[1]}")
print(f"compiling {begin.origin} for {len(devices)} chips of {topology} …", flush=True)
compiled = Trainer(plan.setup, mesh).lower(settings.data.batch_size, settings.data.context_length).compile()
memory = compiled.memory_analysis()
parts = {
    "arguments": memory.argument_size_in_bytes,
    "new outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # not donated
    "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
}
for name, size in parts.items():
    print(f"{name:12} {size / 1e9:8.2f} GB a chip")
total = sum(parts.values()) / 1e9
fits = total <= float(gigabytes)
print(f"{'total':12} {total:8.2f} of {gigabytes} GB: {'fits' if fits else 'does not fit'}")
sys.exit(0 if fits else 3)
EOT
