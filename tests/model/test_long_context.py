"""Long rows in memory that grows with their length, not with its square. Each runs in a process of its own, whose peak
is its own."""

import json
import subprocess
import sys

import pytest

PRELUDE = """
import json, resource, torch
from calledshot.model import Decoder, EncoderInputs
from calledshot.recipe import schema

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def model(**keys):
    '''One layer of two query heads over one key head.'''
    small = dict(layers=1, width=32, heads=2, kv_heads=1, hidden=64, vocabulary=64, context=length)
    decoder = Decoder(schema.Model(**{**small, **keys}))
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data.normal_(0.0, parameter.size(-1) ** -0.5, generator=generator)
    return decoder

def report(**found):
    print(json.dumps({"peak": peak() - before, **found}))

tokens = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(1))
before = peak()
"""


def run(length: int, script: str) -> dict[str, float]:
    """What a script reports; `peak` in MiB above what the imports take."""
    process = subprocess.run(
        [sys.executable, "-c", f"length = {length}\n{PRELUDE}\n{script}"], capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("length, most", [(16_384, 250), pytest.param(262_144, 800, marks=pytest.mark.slow)])
def test_a_forward_pass_and_cached_decoding(length, most):
    """The last tokens, decoded again one by one, give what the pass over all of them gave. The scores of 262,144 tokens
    would take 256 GiB a head."""
    found = run(
        length,
        """
with torch.no_grad():
    decoder = model()
    cache = decoder.new_cache(1, length)
    states = decoder.hidden_states(tokens, cache=cache)
    difference = 0.0
    for at in range(length - 3, length):
        again = decoder.hidden_states(tokens[:, at : at + 1], torch.tensor([[at]]), cache=cache)
        difference = max(difference, float((again - states[:, at : at + 1]).abs().max()))
    report(difference=difference)
""",
    )
    assert found["difference"] < 1e-5
    assert found["peak"] < most


def test_a_prompt_read_in_two_pieces_through_a_cache():
    """The scores of the second piece on the whole cache would take 15 GiB, and what the mask adds to them 7.5."""
    found = run(
        8192,
        """
with torch.no_grad():
    decoder = model(context=262_144)
    cache = decoder.new_cache(1, 262_144)
    first = decoder.hidden_states(tokens[:, :512], cache=cache)
    second = decoder.hidden_states(tokens[:, 512:], torch.arange(512, length)[None], cache=cache)
    report(difference=float((torch.cat([first, second], 1) - decoder.hidden_states(tokens)).abs().max()))
""",
    )
    assert found["difference"] < 1e-5
    assert found["peak"] < 1000


@pytest.mark.slow
def test_a_prefix_of_half_the_row():
    """The mask would take 1 GiB as booleans and 4 GiB more as what is added to scores."""
    found = run(
        32_768,
        """
with torch.no_grad():
    regions = (torch.arange(length)[None] < length // 2).to(torch.int8)
    states = model(topology="prefix").hidden_states(tokens, regions_BT=regions)
    report(finite=bool(states.isfinite().all()))
""",
    )
    assert found["finite"]
    assert found["peak"] < 800


@pytest.mark.slow
def test_training_on_a_prefix_keeps_no_mask():
    """Two layers' masks would take 2 GiB in the backward, as what is added to scores."""
    found = run(
        16_384,
        """
decoder = model(topology="prefix", layers=2)
regions = (torch.arange(length)[None] < length // 2).to(torch.int8)
loss, z_term = decoder.loss(
    tokens, tokens, torch.ones(1, length), torch.tensor(1 / length), 1e-4, regions_BT=regions
)
(loss + z_term).backward()
report(finite=all(bool(each.grad.isfinite().all()) for each in decoder.parameters()))
""",
    )
    assert found["finite"]
    assert found["peak"] < 900


@pytest.mark.slow
def test_an_encoder_of_65536_tokens_pooled_by_8():
    found = run(
        65_536,
        """
with torch.no_grad():
    decoder = model(topology="encoder-decoder", encoder_layers=4, encoder_pooling=8)
    cache = decoder.new_cache(1, 64, length // 8)
    states = decoder.hidden_states(tokens[:, :8], cache=cache, encoder_inputs=EncoderInputs(tokens))
    report(finite=bool(states.isfinite().all()))
""",
    )
    assert found["finite"]
    assert found["peak"] < 400
