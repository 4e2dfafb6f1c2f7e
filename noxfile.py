"""`nox` runs what a change must pass, `nox -s quick` a part of it, `nox -s deep` the rest."""

import re
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
# `deep` and `quick` run in the environments that `nox` made.
nox.options.reuse_venv = "yes"

# The test environments' versions; what users install has ranges, in pyproject.toml.
KERAS = "keras==3.15.1"
# The oldest that are promised, in pyproject.toml. (torch's older builds bring gigabytes of CUDA:
# what was run there by hand is in CONTRIBUTING.md.)
OLDEST_KERAS = "keras==3.10.0"
OLDEST = {
    "tensorflow": ["tensorflow-cpu==2.19.0", "tensorboard==2.19.0"],
    "jax": ["jax==0.4.38"],
}
BACKENDS = {
    "tensorflow": ["tensorflow-cpu==2.21.0", "tensorboard==2.21.0"],
    # With what says nothing about a backend, and is tested on this one. The tuner imports six, and
    # does not require it.
    "jax": ["jax==0.10.2", "ipython", "keras-tuner", "six"],
    "torch": ["torch==2.13.0", "torchjd==0.18.0", "softadapt==0.2.0"],
}
MANUAL = ["README.md", "docs"]
PACKAGE = ["tests", "keras_dwa"]
# The most telling tests.
QUICK = [
    f"tests/test_{name}.py"
    for name in (
        *("adapt", "formula", "fit", "logs", "rules", "assign", "scheduler", "bad_input", "state"),
        *("compound_loss", "ledger", "windows", "wiring", "saving"),
    )
]
DEPEND_ON_KERAS = [
    f"tests/test_{name}.py"
    for name in (
        *("adapt", "compound_loss", "config", "counts", "fit", "models", "one_output"),
        *("own_steps", "saving", "windows", "wiring"),
    )
]
DEPEND_ON_TENSORFLOW = [
    f"tests/test_{name}.py" for name in ("compound_loss", "fit", "one_output", "saving", "windows")
]
# Tests of code that only runs on torch.
TORCH_ALONE = ["tests/test_ranks.py", "tests/test_backends.py"]
# Tests that mostly run in other processes, and cover nothing that others do not.
IN_PROCESSES = [
    f"tests/test_{name}.py" for name in ("examples", "benchmarks", "distribution", "killed")
]
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis", "mpmath", "sybil", "scikit-learn"]
TEST_TOOLS += ["matplotlib", "coverage"]
TRACED = ("coverage", "run", "-m", "pytest")
THIRD_PARTY = [
    "keras-rs==0.4.0",
    "grain==0.2.18",
    "kagglehub==1.0.2",
    "regex==2026.11.19",
    "rich",
    "tokenizers==0.23.3",
]

OTHER_TOOLS = [
    *("comet-ml==3.58.8", "dvclive==3.49.1", "mlflow==3.17.2", "optuna==5.0.0"),
    *("optuna-integration==5.0.0", "scikeras==0.13.0", "wandb==0.31.0"),
]


def install(session, *packages):
    # Modules are compiled when imported, which is faster than compiling all of them now.
    session.install("--no-compile", "-c", "constraints.txt", *packages)


def install_all_backends(session):
    packages = dict.fromkeys(package for packages in BACKENDS.values() for package in packages)
    install(session, KERAS, *packages, "scikit-learn", "matplotlib", ".")


def pytest_environment(session, backend, caches=True):
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    # The suite spends far longer on compiling than on running, and compiles much more than once.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    if caches:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(session.cache_dir.absolute() / "jax")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Many tests start processes, and compiling TensorFlow's Python files is most of an import.
    environment["PYTHONDONTWRITEBYTECODE"] = ""
    return environment


def run_tests(session, backend, *arguments, runner=("pytest",), caches=True):
    environment = pytest_environment(session, backend, caches)
    # Each file runs in one worker, because the blocks of a page build on each other.
    session.run(*runner, "-n", "2", "--dist", "loadfile", *arguments, env=environment)


@nox.session
def lint(session):
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session):
    # Without Keras, because it has no types.
    install(session, "mypy", "numpy", "matplotlib")
    session.run("mypy")


@nox.session(default=False)
def docs(session):
    """The manual as a site, in `site/`: every link and reference holds."""
    install(session, "mkdocs-material", "mkdocstrings[python]", "ruff")
    # With `--quiet`, `--strict` would have no effect.
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
@nox.parametrize("backend", list(BACKENDS))
def tests(session, backend):
    """The suite, with the code of the manual. `-- quick` and `-- deep` run other parts."""
    run_part = {"": run_suite, "quick": run_most_telling, "deep": run_rest}
    install(session, KERAS, *BACKENDS[backend], *TEST_TOOLS, ".")
    run_part[" ".join(session.posargs)](session, backend)


def run_suite(session, backend):
    run_tests(session, backend, *MANUAL, *PACKAGE)


def run_most_telling(session, backend):
    run_tests(session, backend, "-k", "not eager", *QUICK)


def run_rest(session, backend):
    """The tests that `nox` leaves out. On JAX all tests, to cover every branch."""
    if backend == "jax":
        # JAX covers all branches except torch's. On Python 3.11, tracing doubles the time.
        session.run("coverage", "erase")
        others = [f"--ignore={path}" for path in IN_PROCESSES]
        run_tests(session, backend, "-m", "", *others, *PACKAGE, runner=TRACED)
        run_tests(session, backend, "-m", "deep", *IN_PROCESSES)
        return
    others = []
    if backend == "torch":
        run_tests(session, backend, "-m", "", *TORCH_ALONE, runner=TRACED)
        others = [f"--ignore={path}" for path in TORCH_ALONE]
        # The two read and write each other's files.
        jax, *_ = BACKENDS["jax"]
        install(session, jax)
    run_tests(session, backend, "-m", "deep", *others, *MANUAL, *PACKAGE)
    if backend == "torch":
        session.run("pip", "uninstall", "--yes", "jax", "jaxlib", silent=True)


@nox.session(default=False, venv_backend="none")
def quick(session):
    """While you work: style, types, and the most telling tests on JAX."""
    session.notify("lint")
    session.notify("types")
    session.notify("tests(backend='jax')", ["quick"])


@nox.session(default=False, venv_backend="none")
def deep(session):
    """Tests beyond what `nox` runs: worth running, but not worth waiting for."""
    for backend in BACKENDS:
        session.notify(f"tests(backend='{backend}')", ["deep"])
    for backend in OLDEST:
        session.notify(f"oldest(backend='{backend}')")
    for name in ("coverage", "docs", "package", "readme"):
        session.notify(name)


@nox.session(default=False)
@nox.parametrize("backend", list(OLDEST))
def oldest(session, backend):
    """Tests that depend on versions, with the oldest Keras, JAX and TensorFlow."""
    # Without the constraints, which are for the newest versions.
    session.install("--no-compile", OLDEST_KERAS, *OLDEST[backend], *TEST_TOOLS, ".")
    tests = DEPEND_ON_KERAS if backend == "jax" else DEPEND_ON_TENSORFLOW
    # What JAX 0.4.38 reads from its cache computes something else where buffers are donated.
    run_tests(session, backend, "-k", "not eager", *tests, caches=False)


@nox.session(default=False)
def coverage(session):
    """Checks that `tests -- deep` ran every branch of the package."""
    install(session, "coverage")
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session(default=False)
def package(session):
    """Builds the package and checks how it would be published. `-- FOLDER` keeps the files."""
    install(session, "build", "twine")
    folder = Path(*session.posargs or [session.create_tmp()])
    session.run("python", "-m", "build", "--outdir", folder, silent=True)
    (wheel,) = folder.glob("*.whl")
    session.run("twine", "check", "--strict", *map(str, folder.glob("keras_dwa*")))
    if "keras_dwa/py.typed" not in zipfile.ZipFile(wheel).namelist():
        session.error(f"{wheel} lacks py.typed")


@nox.session(default=False, reuse_venv=False)
def readme(session):
    """What a new user does, in a new environment: README's commands and code, the notebook."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    commands, *_ = (block for language, block in blocks if language == "sh")
    script = Path(session.create_tmp(), "readme.py")
    script.write_text("\n".join(block for language, block in blocks if language == "python"))
    session.run("bash", "-euc", f"{commands}\npython {script}", external=True)
    install(session, "nbclient", "ipykernel")
    # Its outputs are not kept.
    session.run("jupyter", "execute", "examples/quickstart.ipynb", env={"KERAS_BACKEND": "jax"})


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS))
def nightly(session, backend):
    """The suite on the nightly Keras."""
    install(session, *BACKENDS[backend], *TEST_TOOLS)
    # TensorFlow installs a released Keras. Replaces it by the nightly one.
    session.run("pip", "uninstall", "--yes", "keras", silent=True)
    session.install("--pre", "--upgrade", "keras-nightly")
    session.install("--no-deps", ".")
    run_tests(session, backend, *MANUAL, *PACKAGE)


@nox.session(default=False)
def benchmarks(session):
    """Measures the tables of `benchmarks/README.md` again. Takes about an hour."""
    install_all_backends(session)
    # It requires torchvision, but its weightings do not import it.
    session.install("--no-deps", "LibMTL==1.1.5")
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session(default=False)
def study(session):
    """Trains the missing runs of the study of `docs/evidence.md`; writes tables and pictures."""
    install_all_backends(session)
    session.run("python", "benchmarks/study/run.py", *session.posargs)


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS))
def third_party(session, backend):
    """The manual's page about models of other packages, with those packages."""
    install(session, KERAS, *BACKENDS[backend], *TEST_TOOLS, *THIRD_PARTY, ".")
    # KerasHub requires the whole of TensorFlow, but loads data with Grain where that is installed.
    session.install("--no-deps", "keras-hub==0.32.0")
    run_tests(session, backend, "docs/third_party.md")


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS))
def other_tools(session, backend):
    """The manual's page about loggers and searches of other packages, with those packages."""
    install(session, KERAS, *BACKENDS[backend], *TEST_TOOLS, ".")
    # They require older packages than the constraints, and raise warnings themselves.
    session.install("--no-compile", *OTHER_TOOLS)
    run_tests(session, backend, "-W", "default", "docs/other_tools.md")


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS))
def properties(session, backend):
    """The properties of the formula and of whole histories, on 100,000 examples of each."""
    install(session, KERAS, *BACKENDS[backend], *TEST_TOOLS, ".")
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    arguments = ("--hypothesis-profile=many", "--hypothesis-show-statistics")
    session.run("pytest", "-n", "2", *arguments, "tests/test_properties.py", env=environment)


@nox.session(default=False)
@nox.parametrize("backend", ["torch", "jax"])
def mutants(session, backend):
    """Finds changes of the code that no test notices. See `[tool.mutmut]`. Takes several hours."""
    install(session, KERAS, *BACKENDS[backend], *TEST_TOOLS, "mutmut", "mypy", ".")
    session.env.update(pytest_environment(session, backend))
    # One thread in each of the forked processes.
    session.env["OMP_NUM_THREADS"] = "1"
    session.run("mutmut", "run", "--max-children", "2", *session.posargs)
    session.run("mutmut", "results")
