"""docs/guides/scale.md: its table is what its command prints, and its command lines for several processes are ones."""

import re
import shlex
import subprocess
import sys

import pytest

from bench import cards
from functional_sd3.cli import parser, train_estimate
from functional_sd3.parallel import mesh as meshes
from tests.docs import markdown

PAGE = (markdown.ROOT / "docs" / "guides" / "scale.md").read_text(encoding="utf-8")
LAUNCHES = [line for line in PAGE.splitlines() if "torchrun" in line and "-m functional_sd3 " in line]


@pytest.mark.parametrize("line", LAUNCHES)
def test_a_launch_starts_as_many_processes_as_its_mesh_is_for_and_its_command_is_one(line):
    launch, command = line.split("-m functional_sd3 ", 1)
    numbers = {name: re.search(rf"--{name}[= ](\S+)", launch) for name in ("nnodes", "nproc-per-node")}
    nodes = re.search(r"--nodes=(\d+)", PAGE)
    assert nodes is not None
    counts = [int(nodes[1] if "$" in found[1] else found[1]) for found in numbers.values() if found]
    arguments = parser.build().parse_args(shlex.split(command))
    sizes = meshes.parse(arguments.mesh)
    wanted = 1
    for size in sizes.values():
        wanted *= size
    assert wanted == counts[0] * (counts[1] if len(counts) > 1 else 1)
    if arguments.subcommand == "train":
        assert arguments.batch_size % (sizes.get("data", 1) * sizes.get("fsdp", 1)) == 0


def test_there_are_launches_of_one_machine_of_two_and_of_slurm():
    assert len(LAUNCHES) >= 6 and any("srun" in line for line in LAUNCHES)
    assert any("--nnodes 2" in line for line in LAUNCHES)


def test_the_batch_script_is_one_of_the_shell(tmp_path):
    (script,) = [part for part in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if part.startswith("#!")]
    (tmp_path / "train.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "train.sh")], check=True)


def test_the_table_of_cards_is_what_its_command_prints():
    for line in [*cards.rows(), *cards.ways()]:
        assert line + "\n" in PAGE


@pytest.mark.parametrize("count", cards.COUNTS)
def test_the_choices_of_the_table_are_their_options(count, capsys):
    """By `train --estimate` with the options of the page."""
    for ways in cards.WAYS.values():
        for way in ways.values():
            mesh = cards.MESHES[count][way.axis]
            words = ["train", "--estimate", "--params", "sd3.5-medium", "--batch-size", str(count), "--device", "cpu"]
            words += [*way.options.split(), *(["--mesh", mesh] if mesh else [])]
            choice = train_estimate.choice_of(parser.build().parse_args(words))
            expected = cards.choice(way, count)
            for name in ("batch", "side", "tokens", "rule", "computed", "lora", "remat", "base", "mesh", "accumulate"):
                assert getattr(choice, name) == getattr(expected, name), (way, name)


def test_the_command_of_the_table_runs():
    done = subprocess.run([sys.executable, "-m", "bench.cards", "--help"], capture_output=True, text=True, check=True)
    assert "nine tenths" in done.stdout
