"""Networks written without fastseg in mind, under fastseg.swap_functions and torch.compile(backend="fastseg")."""

import pytest
import torch
from support.wild.cases import CASES, GRADIENT_TOLERANCE, batch

import fastseg
from fastseg.verification import equivalence


@pytest.fixture(params=[name for name in CASES if torch.cuda.is_available() or not CASES[name].slow_to_train])
def case(request):
    return CASES[request.param]


@pytest.fixture
def model(case, device):
    return case.model(device)


@pytest.fixture
def data(case, device):
    return batch(case, device)


def test_functional_calls_are_replaced_with_the_same_results(case, model, data, device):
    plain, truth = equivalence.outcome(model, data), equivalence.in_float64(model, data)
    with fastseg.swap_functions() as swapped:
        found = equivalence.outcome(model, data)
    if device == "cpu":
        assert equivalence.equal(found, plain)
    assert swapped.calls == case.calls and not swapped.left
    with fastseg.backend("triton"), fastseg.swap_functions():
        found = equivalence.outcome(model, data)
    assert equivalence.failures(equivalence.compare_outcomes(found, plain, truth, GRADIENT_TOLERANCE)) == []
    assert not equivalence.equal(found, plain)  # else torch was compared with itself
    assert device == "cuda" or equivalence.equal(equivalence.outcome(model, data), plain)


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].compiled], indirect=True)
def test_a_compiled_graph_is_rewritten_with_the_same_results(case, model, data):
    inner = "aot_eager" if case.called else "eager"  # tracing the backward as well takes as long as the rest
    plain, truth = equivalence.outcome(model, data), equivalence.in_float64(model, data)
    reports = []
    torch.compiler.reset()
    compiled = torch.compile(model, backend=fastseg.compile_backend, fullgraph=True,
                             options={"inner": inner, "report": reports.append})  # fmt: skip
    with fastseg.backend("triton"):
        found = equivalence.outcome(compiled, data)
    renamed = {
        kind: {name.removeprefix("_orig_mod."): tensor for name, tensor in found[kind].items()} for kind in found
    }
    assert equivalence.failures(equivalence.compare_outcomes(renamed, plain, truth, GRADIENT_TOLERANCE)) == []
    assert [report.rewritten for report in reports] == [case.compiled]
