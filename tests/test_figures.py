"""Every measured figure of the README and of docs/ is that of the rows that it comes from.

Pages and tables that a tool writes are made again from their CSV files. What is written by hand,
tables and sentences, is put together here from the same files and looked up in the page; in the
sections that report measurements no number may be left over: one that stands in no CSV file has to
be named here, with its reason.
"""

import csv
import functools
import re
from collections.abc import Callable

import inject_faults
import model_scaling
import numpy as np
import pytest
import report_performance
import report_streams
import report_study
from tiny_config import ROOT

DOCS = ROOT / 'docs'
README, RESULTS = ROOT / 'README.md', DOCS / 'results.md'
STUDIES = sorted(path.stem.removesuffix('_summary') for path in DOCS.glob('results/*_summary.csv'))
METRICS = {'digits': ('digits/accuracy',)}


# What the rows say.


@functools.cache
def study(name):
    metrics = METRICS.get(name, report_study.METRICS)
    return report_study.Study(DOCS / f'results/{name}.csv', None, metrics)


@functools.cache
def summary(name):
    return {row.setting: row for row in report_study.summarize(study(name))}


VALUES = {
    'early': lambda steps, curve: curve[report_study._early_index(steps)],
    'end': lambda steps, curve: curve[-1],
    'area': report_study.area_under,
}


def versus(one, other, value='end'):
    """Return the paired gain of a setting over another, each as (study, setting)."""
    runs, others = (study(s).per_run(VALUES[value])[setting] for s, setting in (one, other))
    return report_study.compare(np.array([runs[k] - others[k] for k in runs if k in others]))


def gain(comparison):
    """Write a gain with its interval."""
    text = f'{comparison.mean:+.1f} [{comparison.low:+.1f}, {comparison.high:+.1f}]'
    return re.sub(r'^[+-]0\.0 ', '0.0 ', text)


@functools.cache
def condensation(name):
    """Return scores and shares of closed gates by setting, tag and iteration."""
    found = {}
    with (DOCS / f'results/{name}_condensation.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            tags = found.setdefault(row['setting'], {})
            tags.setdefault(row['tag'], {})[int(row['step'])] = float(row['value'])
    return found


def closed_shares(name, setting, warmup=50):
    """Return by layer the share of closed gates after the warm-up."""
    return {
        tag.partition('/')[2]: np.mean([v for step, v in values.items() if step > warmup])
        for tag, values in condensation(name)[setting].items()
        if tag.startswith('condensed_share/') and tag.split('/')[1] not in ('mean', 'max')
    }


def score(name, setting, layer, steps):
    """Return the mean score of a layer over some iterations that were logged."""
    values = condensation(name)[setting][f'condensation/{layer}']
    return np.mean([values[step] for step in steps])


# Pages and tables that a tool writes.


def write_summary(name, folder):
    path = folder / 'summary.csv'
    report_study.write_summary(list(summary(name).values()), study(name).metrics, path)
    return path.read_text()


def write_tables(name, folder):
    tables = [report_study.make_table(list(summary(name).values()), study(name).metrics)]
    if study(name).evaluations():
        tables.append(report_study.make_evaluation_table(study(name)))
    return '\n\n'.join(tables) + '\n'


def write_performance(folder):
    runs = report_performance.read_runs(DOCS / 'performance.csv')
    figures = report_performance.make_figures(runs, 'performance.png')
    return report_performance.replace_figures((DOCS / 'performance.md').read_text(), figures)


# By file in docs/: what it has to be, given a folder to write to.
GENERATED: dict[str, Callable] = {
    'faults.md': lambda folder: inject_faults.make_page(
        inject_faults.read_outcomes(DOCS / 'faults.csv')
    ),
    'scaling.md': lambda folder: model_scaling.make_page(
        model_scaling.read_rows(DOCS / 'scaling.csv'), 'scaling.png'
    ),
    'performance.md': write_performance,
    'condensation.md': lambda folder: report_streams.rewrite(
        (DOCS / 'condensation.md').read_text()
    ),
    **{f'results/{n}.md': functools.partial(write_tables, n) for n in STUDIES},
    **{f'results/{n}_summary.csv': functools.partial(write_summary, n) for n in STUDIES},
}


@pytest.mark.parametrize('file', GENERATED)
def test_what_a_tool_wrote_is_of_the_rows(file, tmp_path):
    assert (DOCS / file).read_text() == GENERATED[file](tmp_path)


# Tables that are written by hand.


def sections(path):
    """Return the text of a page by its headings."""
    parts = re.split(r'^#+ (.*)$', path.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse_tables(text):
    """Return the tables of a text, each as rows of cells, the header first."""
    found = []
    for block in re.findall(r'(?:^\|.*\n?)+', text, flags=re.MULTILINE):
        rows = [[c.strip() for c in line.strip('|\n').split('|')] for line in block.splitlines()]
        found.append([row for row in rows if set(''.join(row)) - set('-: ')])
    return found


def without(rows, column):
    """Return a table without a column."""
    index = rows[0].index(column)
    return [row[:index] + row[index + 1 :] for row in rows]


def generated_tables(*names, kind=0):
    return [parse_tables(write_tables(name, None))[kind] for name in names]


# By section of results.md. Where the times say nothing they are left out.
TABLES = {
    'Which norm': lambda: [without(*generated_tables('pennfudan'), 'time')],
    'What of UBN does it': lambda: [without(*generated_tables('pennfudan_ablation'), 'time')],
    'Small batches': lambda: generated_tables(*(f'pennfudan_batch{n}' for n in (1, 2, 8))),
    'SGD': lambda: generated_tables('pennfudan_sgd'),
    'Fine-tuning': lambda: generated_tables('pennfudan_finetune'),
    'Padding': lambda: generated_tables('pennfudan', kind=1),
    'Generated images': lambda: generated_tables('generated'),
    'Handwritten digits': lambda: generated_tables('digits'),
}
# Measured before there were CSV files, or in a way that leaves none; see the page.
TABLES_WITHOUT_ROWS = {
    'Which norm': ['norm', 'iteration, against BN'],
    'What else was tried': ['variant', 'gain at 1/4', 'gain at the end', 'gain in area'],
}
TABLES_WITHOUT_FIGURES = {'Defaults': ['default', 'because']}


@pytest.mark.parametrize('section', TABLES)
def test_table_of_the_results_is_of_the_rows(section):
    tables = parse_tables(sections(RESULTS)[section])
    named = (TABLES_WITHOUT_ROWS.get(section), TABLES_WITHOUT_FIGURES.get(section))
    assert [table for table in tables if table[0] not in named] == TABLES[section]()


def test_every_table_of_the_results_is_known():
    for section, text in sections(RESULTS).items():
        known = [table[0] for table in TABLES[section]()] if section in TABLES else []
        known += [
            names[section]
            for names in (TABLES_WITHOUT_ROWS, TABLES_WITHOUT_FIGURES)
            if section in names
        ]
        assert [table[0] for table in parse_tables(text)] == known


README_ROWS = {
    'BN': ('pennfudan', 'BN'),
    '**UBN, the defaults**': ('pennfudan', 'UBN, threshold off'),
    'UBN, `condensation_threshold=0.6`': ('pennfudan', 'UBN, threshold 0.6'),
    'UBN, `centering=False, scaling=False`': ('pennfudan_ablation', 'neighbourhood alone'),
    'GN': ('pennfudan', 'GN'),
    'RBN': ('pennfudan', 'RBN'),
}


def test_table_of_the_readme_is_of_the_rows():
    ((_, *rows),) = parse_tables(sections(README)['Measured so far'])
    expected = []
    for name, (stem, setting) in README_ROWS.items():
        row = summary(stem)[setting]
        cells = [
            *(report_study.spread(values) for values in row.final),
            *('' if setting == 'BN' else gain(g) for g in (row.early_gain, row.final_gain)),
        ]
        if name.startswith('**'):
            cells = [f'**{cell}**' for cell in cells]
        expected.append([name, str(row.final_gain.num_pairs), *cells])
    assert rows == expected


# Sentences.

P, A, SGD, FINE = 'pennfudan', 'pennfudan_ablation', 'pennfudan_sgd', 'pennfudan_finetune'
OFF, GATED, LONG = (A, 'UBN, threshold off'), (P, 'UBN, threshold 0.6'), 'of the iterations'
BN_LONG, BN_FAST = (A, 'BN, 4/3 of the iterations'), (A, 'BN, twice the learning rate')
UBN_FAST = (A, 'UBN, threshold off, twice the learning rate')
ALONE, FIVE = (A, 'neighbourhood alone'), (A, 'neighbourhood 5 alone')


def mean(comparison):
    return f'{abs(comparison.mean):.1f}'


def results_sentences():
    yield time_of_iteration('performance.md')
    off, threshold = summary(P)['UBN, threshold off'], summary(P)['UBN, threshold 0.6']
    bn, alone = summary(P)['BN'], summary(A)['neighbourhood alone']
    fast_bn = summary(A)[BN_FAST[1]]
    sgd = summary(SGD)['UBN, threshold off, rate of 0.05']
    digits = ('digits', 'UBN, threshold 0.6'), ('digits', 'UBN, threshold off')
    fine = summary(FINE)
    shares = closed_shares(*GATED)
    often = sorted(layer for layer, share in shares.items() if share > 0.9)
    some = sorted(layer for layer, share in shares.items() if 0.5 < share <= 0.9)
    assert often == [
        *(f'backbone.layer4.{name}' for name in ('0.bn1', '0.bn2', '1.bn1', '1.bn2')),
        *('neck.fpn_convs.3.bn', 'neck.lateral_convs.3.bn'),
    ]
    assert len(some) == 4 and shares['backbone.bn1'] == 0
    assert round(np.mean([*shares.values()]), 1) == 0.4
    last, around, first = (210, 220, 230, 240), (50, 60, 70), (10, 20)
    deep = 'backbone.layer4.1.bn2'
    rises = {
        setting: [score(A, setting, deep, steps) for steps in (first, around, last)]
        for setting in ('score of BN', 'score of UBN')
    }
    small = condensation('pennfudan_batch2')['score of BN'][f'condensation/{deep}']
    small = [value for step, value in small.items() if step >= 60]
    large = condensation('pennfudan_batch8')['score of BN'][f'condensation/{deep}']
    gate_means = [np.mean([*closed_shares(A, f'threshold {t}').values()]) for t in (0.8, 0.4)]
    assert [round(share, 2) for share in gate_means] == [0.1, 0.94]
    for other in ('threshold 0.4', 'threshold 0.8'):
        assert round(versus((A, other), OFF).mean) == -1
    two = [
        study('pennfudan_batch2').curves(f'UBN, threshold {name}').values.mean(0)
        for name in ('0.6', 'off')
    ]
    assert {round(gap) for gap in (two[1] - two[0])[1:]} == {1, 2}
    # At every evaluation after the warm-up.
    pair = [study('digits').curves(setting) for _, setting in digits]
    below = (pair[0].values - pair[1].values).mean(0)
    assert (below[pair[0].steps > 50] < 0).all()
    assert all(
        f'{gate:.1f}' == f'{ungated:.1f}'
        for gate, ungated in zip(
            study(A).curves('score of UBN').values[0, -1:],
            study(A).curves('UBN, threshold off').values[0, -1:],
        )
    )

    # In short.
    yield (
        f'is above BN by {off.early_gain.mean:.1f} points at a quarter of the schedule and by '
        f'{off.final_gain.mean:.1f} at its end, in every pair'
    )
    assert off.early_gain.num_better == off.final_gain.num_better == off.final_gain.num_pairs == 5
    yield f'BN that trains a third longer the gain at the end is {mean(versus(OFF, BN_LONG))}.'
    yield (
        f'BN itself gains {fast_bn.final_gain.mean:.1f} from twice the learning rate, where UBN '
        f'gains {mean(versus(UBN_FAST, OFF))}: of the gain over BN at its better rate '
        f'{mean(versus(OFF, BN_FAST))} is left at the end and '
        f'{versus(OFF, BN_FAST, "early").mean:.1f} at a quarter.'
    )

    # Which norm.
    yield (
        f'makes up for {summary(A)[BN_LONG[1]].final_gain.mean:.1f} of the '
        f'{off.final_gain.mean:.1f} points at the end. At a quarter BN is at '
        f'{bn.early.mean():.1f} points with 60 iterations'
    )
    yield f'*BN, twice the learning rate* is at {fast_bn.early.mean():.1f} there.'

    # What of UBN does it.
    yield (
        'all of it less the neighbourhood alone is '
        f'{gain(versus(OFF, ALONE, "early"))} at a quarter and {gain(versus(OFF, ALONE))} at the '
        f'end, five pairs.'
    )
    slow = (A, 'without gain')
    yield (
        f'is {mean(versus(OFF, slow))} below at the end and '
        f'{mean(versus(OFF, slow, "early"))} at a quarter'
    )
    rectifiers = summary(A)['centering and scaling']
    yield f'within the noise of BN: {gain(rectifiers.final_gain)} at the end, three pairs.'
    five = versus(FIVE, ALONE)
    yield (
        f'is above one of 3 by {five.mean:.1f} [{five.low:+.1f}, {five.high:+.1f}] at the end and '
        'level at a quarter, five pairs'
    )
    fast = versus(UBN_FAST, BN_FAST)
    yield (
        f'At twice the rate BN gains {fast_bn.final_gain.mean:.1f} and UBN '
        f'{mean(versus(UBN_FAST, OFF))}; UBN is above BN by {fast.mean:.1f} '
        f'[{fast.low:+.1f}, {fast.high:+.1f}] there.'
    )

    # The threshold.
    plain = (P, 'UBN, threshold off')
    yield (
        f'0.6 less off is {gain(versus(GATED, plain, "early"))} at a quarter and '
        f'{gain(versus(GATED, plain))} at the end, five pairs.'
    )
    frozen = (A, 'threshold 0.6, freeze')
    yield (
        f'`freeze` at 0.6 is {mean(versus(frozen, OFF))} lower at the end and '
        f'{mean(versus(frozen, OFF, "area"))} in area (two pairs)'
    )
    yield (
        'in the last norm of `layer4` from {:.2f} in the first 20 iterations to {:.2f} around '
        'iteration 60, and falls to {:.2f} at the end.'.format(*rises['score of BN'])
    )
    ends = [score(A, s, 'mean', last) for s in ('score of UBN', 'score of BN')]
    yield (
        'it rises *further*, {:.2f} to {:.2f} to {:.2f}'.format(*rises['score of UBN'])
        + ', and over all layers to {:.2f} where BN has {:.2f}'.format(*ends)
        + f' (one seed each; with the gate on, {score(*GATED, "mean", last):.2f} over five)'
    )
    yield (
        f'under BN to between {min(small):.1f} and {max(small):.1f} and stays there with two '
        f'images a step, to {max(large.values()):.1f} and back to '
        f'{np.mean([large[step] for step in last]):.1f} with eight (one seed each, all layers '
        'together {:.2f} and {:.2f} at the end)'.format(
            *(score(f'pennfudan_batch{n}', 'score of BN', 'mean', last) for n in (2, 8))
        )
    )

    # Defaults.
    yield f'5 is worth {five.mean:.1f} more at the end (5 pairs)'
    yield f'+{mean(versus(OFF, slow))} at the end over none (3 pairs)'
    assert alone.final_gain.num_pairs == threshold.final_gain.num_pairs == 5

    # Small batches.
    one = versus(('pennfudan_batch1', 'UBN, threshold off'), ('pennfudan_batch1', 'GN'))
    yield f'is above GN at one by {one.mean:.1f} [{one.low:+.1f}, {one.high:+.1f}] at the end'

    # SGD.
    yield (
        f'UBN is above it by {sgd.final_gain.mean:.1f} at the end and by '
        f'{sgd.early_gain.mean:.1f} at a quarter, five pairs'
    )

    # Fine-tuning.
    gains = [fine[s].final_gain for s in ('UBN, trained', 'UBN, statistics frozen')]
    texts = [f'{g.mean:.1f} [{g.low:+.1f}, {g.high:+.1f}]' for g in gains]
    yield (
        f'gains {texts[0]} over frozen BN at the end with its statistics trained, and {texts[1]} '
        'with them frozen'
    )

    # Padding.
    table = generated_tables(P, kind=1)[0]
    (gn,) = (row for row in table if row[0] == 'GN')
    assert gn[3].startswith('-1.9')
    yield 'GN, whose statistics see it too, loses 1.9 points at 256.'

    # Handwritten digits.
    yield (
        'The neighbourhood gains '
        f'{summary("digits")["UBN, neighbourhood alone"].final_gain.mean:.1f} at the end'
    )
    yield (
        f'by {mean(versus(*digits, "early"))} at a quarter and {mean(versus(*digits))} at the end.'
    )


def time_of_iteration(link):
    """Say how long the study's iteration takes now, as the page on performance has it."""
    with (DOCS / 'performance.csv').open() as file:
        rows = [row for row in csv.DictReader(file) if row['suite'] == 'study']
    bn, ubn = (
        float(row['median']) for name in ('BN', 'UBN') for row in rows if row['method'] == name
    )
    return f"takes {ubn / bn:.2f} times as long with [today's kernels]({link})"


def readme_sentences():
    yield time_of_iteration('docs/performance.md')
    sgd = summary(SGD)['UBN, threshold off, rate of 0.05']
    small = [summary(f'pennfudan_batch{n}')['UBN, threshold off'].final_gain.mean for n in (1, 2)]
    yield (
        f'BN that trains for a third longer is {mean(versus(OFF, BN_LONG))} points below UBN at '
        f'the end, BN at its better learning rate {mean(versus(OFF, BN_FAST))} (3 pairs each)'
    )
    yield (
        f'With SGD at its best rate the gain is {sgd.final_gain.mean:.1f} (5 pairs), with one and '
        f'two images a step {small[0]:.1f} and {small[1]:.1f} (3 pairs each).'
    )


SENTENCES = {README: readme_sentences, RESULTS: results_sentences}


def one_line(text):
    return ' '.join(text.split())


@pytest.mark.parametrize('page', SENTENCES, ids=lambda page: page.name)
def test_sentence_is_of_the_rows(page):
    text = one_line(page.read_text())
    wrong = [sentence for sentence in SENTENCES[page]() if one_line(sentence) not in text]
    assert not wrong


# Numbers that are no measured figure: what was set, counted or cited.
PLAIN = {
    README: [
        '240 iterations of four images',
        'their 95 % intervals',
        # The tests of the layers hold it to this.
        'In float64 on CPU, output and all gradients equal the formulas to 1e-14.',
    ],
    RESULTS: [
        'PyTorch 2.13.0',
        'The aim was 4.0 and 2.0.',
        'ACCV 2007) in COCO instance format, 120 images to train and 50 to test on',
        'ResNet-18 with 24 channels in its first stage, FPN of 48, images of at most 192 x 136, '
        'four a step, AdamW at 1e-3 with 30 iterations of warm-up and cosine to iteration 240.',
        'every 30 iterations. *At 1/4* is iteration 60.',
        'its 95 % interval',
        'sigmoid(1) = 0.73 there). *GN* has 8 groups.',
        '*4/3 of the iterations*',
        '*BN, 4/3 of the iterations* is evaluated every 40 of 320, so that its quarter is at '
        'iteration 80.',
        '**A neighbourhood of 5**',
        'Gates of *threshold 0.6* are looked at from iteration 50 on.',
        'At 0.8 a tenth of the gates are closed, at 0.4 all but one in twenty',
        'With two images a step 0.6 is below off by one to two points from iteration 60 on',
        'momentum 0.9 and weight decay 1e-4',
        'goes on on Penn-Fudan for 120 iterations',
        'padded to multiples of 64 and of 256 pixels instead of 32',
        'at 256 as well',
        '200 digits to learn from and 1,597 to test on',
        'four digits of 8 x 8 pixels',
        '(seed 0, the recipe above)',
        'were chosen on seed 0,',
        '16 images a step',
        'On 8 GPUs with 2 images each, a day for each line at 1x on V100-class hardware',
    ],
}
# Measured, and in no CSV file. Times of an iteration were taken by one process for all norms, and
# only their medians were written down, in the page's own table.
WITHOUT_ROWS = {
    README: ["An iteration took 1.4 times as long as BN's then"],
    RESULTS: [
        "An iteration took about 1.4 times as long as BN's when this was measured",
        'An iteration takes about 0.4 s on one core;',
        'medians of 30.',
        'for an iteration that takes 1.3 times as long.',
        'a reduced grid in less than 15 minutes.',
    ],
}
# The sections of the README that report measurements.
REPORTING = {README: ['Measured so far'], RESULTS: None}


def left_over(page):
    """Return by section the sentences with a number that no rows and no list have."""
    known = [*SENTENCES[page](), *PLAIN[page], *WITHOUT_ROWS[page]]
    found = {}
    for section, text in sections(page).items():
        if REPORTING[page] is not None and section not in REPORTING[page]:
            continue
        text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r'^\|.*$', '', text, flags=re.MULTILINE)
        text = one_line(re.sub(r'\]\(.*?\)', ']', text))
        for sentence in sorted(map(one_line, known), key=len, reverse=True):
            text = text.replace(re.sub(r'\]\(.*?\)', ']', sentence), ' ')
        text = re.sub(r'`.*?`', '', text)
        if re.search(r'\d', text):
            found[section] = re.findall(r'.{0,30}\d+.{0,30}', text)
    return found


@pytest.mark.parametrize('page', SENTENCES, ids=lambda page: page.name)
def test_no_number_is_left_over(page):
    assert left_over(page) == {}


@pytest.mark.parametrize('page', SENTENCES, ids=lambda page: page.name)
def test_lists_of_other_numbers_are_those_of_the_page(page):
    text = one_line(page.read_text())
    assert [item for item in (*PLAIN[page], *WITHOUT_ROWS[page]) if item not in text] == []


def test_a_figure_of_its_own_is_left_over(monkeypatch, tmp_path):
    page = tmp_path / 'results.md'
    page.write_text('# A\n\nThe gain is 8.6 in 240 iterations.\n')
    for pages, items in ((SENTENCES, list), (PLAIN, ['240 iterations']), (WITHOUT_ROWS, [])):
        monkeypatch.setitem(pages, page, items)
    monkeypatch.setitem(REPORTING, page, None)
    assert left_over(page) == {'A': ['The gain is 8.6 in  .']}
