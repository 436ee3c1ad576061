"""The table of attention's compositions in docs/differentiation.md names what is tested, all of it and nothing else."""

import re

from tests.docs.markdown import ROOT
from tests.kernels import test_attention, test_attention_compiled

PAGE = (ROOT / "docs" / "differentiation.md").read_text(encoding="utf-8")


def rows():
    """{first cell: (names of the second cell, names of the third)}."""
    table = PAGE.split("| order | compositions that are tested |")[1].split("\n\n")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:4] for line in table.splitlines()[2:]]
    names = lambda cell: [name.replace(r"\|", "|") for name in re.findall(r"`([^`]+)`", cell)]  # noqa: E731
    return {first.strip(): (names(second), names(third)) for first, second, third in cells}


def test_every_composition_that_is_tested_is_in_the_table_and_no_other():
    by_order = {first: cells for first, cells in rows().items() if first[0].isdigit()}
    tested = [name for names, _ in by_order.values() for name in names]
    assert sorted(tested) == sorted(test_attention.COMPOSITIONS)
    compiled = [name for _, names in by_order.values() for name in names]
    assert sorted(compiled) == sorted(test_attention_compiled.COMPOSITIONS)
    assert set(rows()["of an additive mask"][0]) == set(test_attention.OF_A_MASK)
    assert set(rows()["in bfloat16, nearer to float64 than the formula's"][0]) == set(
        test_attention_compiled.IN_BFLOAT16
    )


def test_the_variants_are_those_that_are_tested():
    listed = PAGE.split("each in these variants: ")[1].split(".")[0]
    assert [name.strip() for name in listed.split(",")] == list(test_attention.VARIANTS)


def test_the_order_of_a_composition_is_that_of_its_derivatives():
    """Counted from its name: a transform of `ORDERS` each time that it occurs."""
    for first, (names, _) in rows().items():
        for name in names if first[0].isdigit() else ():
            words = re.findall(r"[a-z_]+", name.replace("autograd.", ""))
            assert sum(ORDERS.get(word, 0) for word in words) == int(first[0]), name


ORDERS = {
    **dict.fromkeys(("grad", "vjp", "jvp", "jacrev", "jacfwd", "forward_ad", "linearize"), 1),
    **dict.fromkeys(("checkpoint", "is_grads_batched", "twice"), 1),
    **dict.fromkeys(("hvp", "hessian"), 2),
}
