"""Random cases by hypothesis: from a seed that every run says, so that all can be made again."""

import random
import tempfile

import hypothesis
from hypothesis.configuration import set_hypothesis_home_dir

# What it collects on its way; the repository stays as it is.
_home = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(_home.name)

# One for all random cases of a session.
_SEED = random.SystemRandom().randrange(2**32)
_was_said = False


def cases(request, number):
    """Return a decorator that holds a function under ``given`` against ``number`` random cases.

    The seed is that of ``--hypothesis-seed``, or another one in every session. The first use in a
    session says it on the terminal, and each use to what pytest shows of a test that fails.

    Args:
        request (pytest.FixtureRequest): Of the test.
        number (int): How many cases.
    """
    global _was_said
    option = request.config.getoption('--hypothesis-seed')
    seed = _SEED if option is None else int(option)
    message = f'random cases: --hypothesis-seed={seed} makes the same again'
    print(message)
    if not _was_said:
        _was_said = True
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
