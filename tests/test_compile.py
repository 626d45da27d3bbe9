"""torch.compile: decisions stay outside of compiled code, three scales are three shapes, then no recompiles."""

import warnings
from contextlib import nullcontext

import pytest
import torch

import ddit
import tiny
import tiny_z_image
from ddit import FixedSchedule, PatchSchedule
from helpers import random_adapter

SCALES = FixedSchedule(steps=(1, 2, 4, 2, 1, 4))
STEPS = 6
TWO = FixedSchedule(steps=(1, 2, 1, 2))
"""Where compiling takes longer."""


class Counter:
    """A backend that runs the graph as it is and counts how often one is made, and how often one runs."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), None])
def test_repeated_blocks_compile_once_per_scale(pipe, dynamic):
    """The way diffusers recommends, without graph breaks: a second run, another size of the batch's mix of scales
    and the dynamic rule make no graph that the first run has not made."""
    ddit.apply(pipe, patches=SCALES)
    expected = tiny.sample(pipe, steps=STEPS)
    backend = Counter()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, backend=backend)
    compiled = tiny.sample(pipe, steps=STEPS)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    first = backend.graphs
    # One block of each of the two classes; by default the second shape makes a graph for all further ones.
    assert first == 2 * 3 if dynamic is False else 2 * 2 <= first <= 2 * 3
    assert torch.equal(tiny.sample(pipe, steps=STEPS), compiled)
    ddit.apply(pipe, patches=PatchSchedule(threshold=1e9, careful=False))
    tiny.sample(pipe, seed=1)
    assert backend.graphs == first


def test_scale_one_alone_makes_the_graphs_of_a_plain_run(pipe):
    backend = Counter()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    plain = tiny.sample(pipe)
    first = backend.graphs
    with ddit.apply(pipe, patches=PatchSchedule(threshold=0.0)):
        assert torch.equal(tiny.sample(pipe), plain)
    assert torch.equal(tiny.sample(pipe), plain)
    assert backend.graphs == first


def test_a_compiled_transformer_is_accepted_and_given_back(pipe):
    """``torch.compile`` wraps the model in another module, and ddit goes around that."""
    plain = tiny.sample(pipe)
    with ddit.apply(pipe, patches=TWO) as handle:
        coarse = tiny.sample(pipe, steps=STEPS)
        costs = handle.report.flops
    backend = Counter()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, dynamic=False)
    compiled = tiny.sample(pipe)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    wrapper, model = dict(vars(pipe.transformer)), dict(vars(pipe.transformer._orig_mod))
    with ddit.apply(pipe, patches=TWO) as handle:
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), coarse, rtol=1e-4, atol=1e-5)
        graphs, runs = backend.graphs, backend.runs
        tiny.sample(pipe, steps=STEPS)
        assert backend.graphs == graphs and backend.runs >= runs + STEPS
        assert handle.report.strip() == "1 2 1 2 2 2" and handle.report.flops == costs
    assert dict(vars(pipe.transformer)) == wrapper and dict(vars(pipe.transformer._orig_mod)) == model
    assert torch.equal(tiny.sample(pipe), compiled)


def test_a_transformer_compiled_in_place_stays_compiled(pipe):
    """``transformer.compile()`` keeps the module: large patches run compiled as well, a graph for each scale."""
    with ddit.apply(pipe, patches=TWO):
        coarse = tiny.sample(pipe, steps=STEPS)
    backend = Counter()
    pipe.transformer.compile(backend=backend, dynamic=False)
    compiled, graphs = tiny.sample(pipe), backend.graphs
    before = dict(vars(pipe.transformer))
    with ddit.apply(pipe, patches=TWO) as handle:
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), coarse, rtol=1e-4, atol=1e-5)
        assert backend.graphs == 2 * graphs
        runs = backend.runs
        tiny.sample(pipe, steps=STEPS)
        assert backend.graphs == 2 * graphs and backend.runs >= runs + STEPS
        assert handle.report.strip() == "1 2 1 2 2 2"
    assert dict(vars(pipe.transformer)) == before
    assert torch.equal(tiny.sample(pipe), compiled)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiling_after_apply(pipe, in_place):
    """ddit sits inside, where nothing is compiled: the result is the same, and a warning says what to do."""
    handle = ddit.apply(pipe, patches=TWO)
    coarse = tiny.sample(pipe, steps=STEPS)
    if in_place:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.warns(UserWarning, match="is not compiled now: apply ddit again"):
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), coarse, rtol=1e-4, atol=1e-5)
    assert handle.report.strip() == "1 2 1 2 2 2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddit.apply(pipe, patches=TWO)
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), coarse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_adapter_on_what_is_compiled_as_a_whole(pipe, in_place):
    """Compiled code does not look for hooks that come later by itself."""
    adapter = random_adapter(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=TWO):
        expected = tiny.sample(pipe, steps=STEPS)
    if in_place:
        pipe.transformer.compile(backend="eager", dynamic=False)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager", dynamic=False)
    tiny.sample(pipe, steps=2)
    with ddit.apply(pipe, adapter=adapter, patches=TWO):
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["apply", "compile"])
def test_an_adapter_in_compiled_blocks(pipe, first):
    """Compiled before or after: the adapter takes part, and once each scale was seen nothing is compiled again."""
    adapter = random_adapter(pipe.transformer)
    with ddit.apply(pipe, patches=TWO):
        free = tiny.sample(pipe, steps=STEPS)
    with ddit.apply(pipe, adapter=adapter, patches=TWO):
        expected = tiny.sample(pipe, steps=STEPS)
    backend = Counter()
    if first == "compile":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        tiny.sample(pipe)
        with ddit.apply(pipe, patches=TWO):
            tiny.sample(pipe, steps=STEPS)
    ddit.apply(pipe, adapter=adapter, patches=TWO)
    if first == "apply":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    compiled = tiny.sample(pipe, steps=STEPS)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(compiled, free, atol=1e-3)
    graphs = backend.graphs
    assert torch.equal(tiny.sample(pipe, steps=STEPS), compiled)
    ddit.apply(pipe, patches=TWO)
    torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), free, rtol=1e-4, atol=1e-5)
    if first == "apply":
        assert backend.graphs >= graphs  # without the adapter, LoRA is out of the graphs


def test_an_adapter_in_a_transformer_compiled_whole(pipe):
    adapter = random_adapter(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=TWO):
        expected = tiny.sample(pipe, steps=STEPS)
    backend = Counter()
    pipe.transformer.compile(backend=backend, dynamic=False)
    with ddit.apply(pipe, adapter=adapter, patches=TWO):
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-5)
        graphs = backend.graphs
        tiny.sample(pipe, steps=STEPS)
        assert backend.graphs == graphs


@pytest.mark.slow
def test_blocks_share_graphs_with_an_adapter():
    """LoRA finds its weights through the layer, so that the code of one block serves all blocks of its class."""
    pipe = tiny.pipeline(num_layers=3, num_single_layers=3)
    adapter = random_adapter(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=SCALES):
        expected = tiny.sample(pipe, steps=STEPS)
        backend = Counter()
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        torch.testing.assert_close(tiny.sample(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-4)
        graphs = backend.graphs
        tiny.sample(pipe, steps=STEPS)
        assert backend.graphs == graphs
    # Two classes, three scales, the larger two also without the adapter, and one more for some where
    # the second block shows which sizes are dynamic.
    assert graphs <= 2 * 5 + 3


def test_positions_that_a_compiled_whole_would_not_see_move_are_refused():
    """FLUX is told its positions; Wan and Z-Image derive them."""
    for pipe, refused in ((tiny.pipeline(), False), (tiny.wan_pipeline(), True), (tiny_z_image.pipeline(), True)):
        pipe.transformer.compile(backend="eager")
        with pytest.raises(ValueError, match="compile_repeated_blocks") if refused else nullcontext():
            ddit.apply(pipe, preset="paper")
        ddit.apply(pipe, patches=SCALES)


@pytest.mark.parametrize(
    "cache", ["taylorseer:3", *(pytest.param(c, marks=pytest.mark.slow) for c in ("first-block:9", "cache-dit:9"))]
)
def test_what_a_cache_answered_is_seen_through_compiled_blocks(cache):
    """Several blocks of a class share their code, which looks for no hook that comes later."""
    pipe = tiny.pipeline(num_layers=3, num_single_layers=3)
    strips = []
    for compiled in (False, True):
        with ddit.apply(pipe, patches=TWO, cache=cache) as handle:
            if compiled:
                pipe.transformer.compile_repeated_blocks(dynamic=False, backend="eager")
            tiny.sample(pipe, steps=14)
        strips.append(handle.report.strip())
    assert strips[0] == strips[1]
    assert ("(" in strips[0]) and set(strips[0].split()) != {"(1)"}


def test_positions_that_compiled_blocks_would_not_see_move_are_refused():
    """Z-Image's are moved where its first block gets them."""
    pipe = tiny_z_image.CASES["z-image"]["make"]()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="positions='grid'"):
        ddit.apply(pipe, patches=PatchSchedule.paper())
