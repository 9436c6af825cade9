"""The planted faults fit the sources they are patches of, and the tool that plants them judges rightly.

Whether the tests notice them takes minutes and is `make mutants`.
"""

import shutil
import xml.etree.ElementTree as tree

import mutants
import pytest

from fastvit import backends

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
PATCHES = mutants.patches()


@needs_git
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_patch_applies(patch, tmp_path):
    files = mutants.touched(patch)
    assert files
    assert all(name.startswith(("kernels/", "fastvit/", "csrc/cuda/")) for name in files), (
        "faults are planted in the product"
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(mutants.ROOT / name, tmp_path / name)
    assert mutants.apply(patch, tmp_path) == "", "write the patch again: the lines around it have changed"
    assert any((tmp_path / name).read_text() != (mutants.ROOT / name).read_text() for name in files)
    for name in files:
        if name.endswith(".py"):
            compile((tmp_path / name).read_text(), name, "exec")


def test_every_op_has_its_faults():
    counts = {op: sum(patch.parent.name == op for patch in PATCHES) for op in backends.OPS}
    assert min(counts.values()) >= 7, counts
    assert sum(counts.values()) == len(PATCHES) >= 35, "a folder is called as no op is"


def test_an_op_is_tried_by_all_its_files_and_by_no_others():
    files = {op: mutants.op_files(op, mutants.ROOT) for op in backends.OPS}
    assert all(f"tests/test_{op}.py" in files[op] for op in files)
    assert all(f"tests/test_kernels_{op}.py" in files[op] for op in files if "triton" in backends.OPS[op])
    assert all(f"tests/test_cuda_{op}.py" in files[op] for op in ("attention", "linear", "norm_mlp", "patch_embed"))
    assert "tests/test_attention_options.py" in files["attention"]
    together = [name for names in files.values() for name in names]
    assert len({*together}) == len(together)
    assert not {*together} & {"tests/test_kernels.py", "tests/test_op_benchmarks.py"}


@needs_git
def test_a_patch_that_does_not_apply_is_seen(tmp_path):
    patch = tmp_path / "wrong.patch"
    patch.write_text("--- a/kernels/x.py\n+++ b/kernels/x.py\n@@ -1 +1 @@\n-there is no such line\n+whatever\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/x.py").write_text("another line\n")
    assert "does not apply" in mutants.apply(patch, tmp_path)


def case(message=None, kind="failure"):
    inner = "" if message is None else f'<{kind} message="{message}"/>'
    return tree.fromstring(f'<testcase classname="tests.test_x" name="test_y[1]" time="0">{inner}</testcase>')


@pytest.mark.parametrize(
    ("status", "cases", "outcome"),
    [
        (0, [case(), case()], ("survived", "")),
        (1, [case(), case("AssertionError: 3 is not 4")], ("killed", "test_x.py::test_y[1]")),
        (1, [case("RuntimeError: shape", "error")], ("killed", "test_x.py::test_y[1]")),
        (1, [case("NameError: name 'x' is not defined")], ("broken", "NameError: name 'x' is not defined")),
        (1, [case("triton.compiler.errors.CompilationError: at 3:1")], ("broken", None)),
        (1, [case("subprocess.CalledProcessError: Command 'c++'", "error")], ("broken", None)),
        (2, [case("collection failure", "error")], ("broken", None)),
        (4, [], ("broken", "pytest exited with 4")),
        (124, [], ("killed", "the time limit")),
        (-11, [], ("killed", "a crash, signal 11")),
    ],
)
def test_verdict(status, cases, outcome):
    got = mutants.verdict(status, cases)
    assert got == outcome if outcome[1] is not None else got[0] == outcome[0]


def test_one_in_twenty_may_survive_and_none_may_be_unusable():
    def results(**counts):
        return [mutants.Result("op", "fault", kind.replace("_", " ")) for kind in counts for _ in range(counts[kind])]

    assert mutants.enough(results(killed=19, survived=1))
    assert not mutants.enough(results(killed=18, survived=2))
    assert not mutants.enough(results(killed=100, broken=1))
    assert not mutants.enough(results(killed=100, does_not_apply=1))


def test_results_of_ops_not_tried_are_kept(tmp_path):
    path = tmp_path / "mutants.csv"
    mutants.write([mutants.Result("b", "fault", "killed", "a test", 1.0), mutants.Result("a", "fault", "killed")], path)
    mutants.write([mutants.Result("a", "other", "survived")], path)
    assert path.read_text().splitlines()[1:] == ["a,other,survived,,0.0", "b,fault,killed,a test,1.0"]


def test_listing_and_unknown_ops(capsys):
    assert mutants.main(["--list", "layer_norm"]) == 0
    assert "eps-outside-the-root" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no patches of nothing"):
        mutants.main(["nothing"])
