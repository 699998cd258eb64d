"""Random cases by hypothesis: the same in every run, and others in every soak.

A run whose cases change fails now and then for what nobody has changed; a soak is there to find
that. Each says its seed, so that all can be made again.
"""

import random
import tempfile

import hypothesis
from hypothesis.configuration import set_hypothesis_home_dir

# What it collects on its way; the repository stays as it is.
_home = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(_home.name)

_FIXED_SEED = 0
# One for all soaks of a session.
_FRESH_SEED = random.SystemRandom().randrange(2**32)
_said: set[int] = set()


def cases(request, number):
    """Return a decorator that holds a function under ``given`` against ``number`` random cases.

    The seed is that of ``--hypothesis-seed``; without it a fixed one, and in a test that is marked
    as slow another one in every session. The first use of a seed in a session says it on the
    terminal, and each use to what pytest shows of a test that fails.

    Args:
        request (pytest.FixtureRequest): Of the test.
        number (int): How many cases.
    """
    option = request.config.getoption('--hypothesis-seed')
    is_soak = request.node.get_closest_marker('slow') is not None
    seed = int(option) if option is not None else _FRESH_SEED if is_soak else _FIXED_SEED
    message = f'random cases: --hypothesis-seed={seed} makes the same again'
    print(message)
    if seed not in _said:
        _said.add(seed)
        with request.config.pluginmanager.getplugin(
            'capturemanager'
        ).global_and_fixture_disabled():
            print(f'\n{message}')
    settings = hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        # A case is slow for what it tests, not for how it is made.
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    return lambda function: hypothesis.seed(seed)(settings(function))
