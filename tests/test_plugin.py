"""A process for each node, in scripts of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qsmpipe

SCRIPT = """
from nipype.interfaces.utility import Function
from nipype.pipeline.engine import Node, Workflow
from qsmpipe.cli.plugin import ProcessPerNode


def double(number):
    return 2 * number


workflow = Workflow("numbers", base_dir=".")
workflow.add_nodes([Node(Function(function=double), "double")])
workflow.inputs.double.number = 21
{guard}
    graph = workflow.run(plugin=ProcessPerNode({{"n_procs": 1, "log_file": "log.txt"}}))
    print(*(node.result.outputs.out for node in graph.nodes()))
"""


@pytest.fixture
def run(tmp_path: Path):
    def run(guard: str) -> subprocess.CompletedProcess:
        (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
        where = {"PYTHONPATH": str(Path(qsmpipe.__file__).parents[1])}
        return subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=os.environ | where,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_a_script_that_is_guarded_runs(run, tmp_path: Path) -> None:
    done = run('if __name__ == "__main__":')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "42"


def test_a_script_without_the_guard_is_told_so_and_runs_nothing(run, tmp_path: Path) -> None:
    done = run("if True:")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"RuntimeError: {tmp_path / 'script.py'} runs its workflow outside "
        '`if __name__ == "__main__":`, and each node\'s process imports the script: put what runs '
        "the workflow under that line"
    )
    assert done.stderr.count("Traceback") == 1
    assert not (tmp_path / "numbers" / "double").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_fresh_process_takes_the_threads_that_it_is_given_and_no_more(count: int) -> None:
    """Numba's OpenMP, as it starts, takes all processors for torch as well."""
    code = (
        "import torch, numba; from qsmpipe.interfaces.base import set_threads; "
        f"set_threads({count}); print(torch.get_num_threads(), numba.get_num_threads())"
    )
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(count), str(count)]
