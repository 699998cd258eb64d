"""Put NaN, infinity and fp16 overflow into training, and see which norms recover.

A small Mask R-CNN with each norm is trained on generated data by two gloo processes on CPU. For a
few iterations in the middle one rank's sample, or the output of one layer there, is not finite.
All runs have the same seed, data and NonFiniteStepHook; each faulty run is compared with the clean
run of its norm. Writes a CSV file and beside it the page with its tables; ``--report`` writes the
page from the rows that there are.
"""

import argparse
import csv
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from norm_peers import ComposedSyncBN
from torch import Tensor, nn

from ubn_det.engine import prepare
from ubn_det.engine.condensation_hook import unwrap

DEMO = Path(__file__).resolve().parents[1] / 'demo'
CONFIG = DEMO / 'mask-rcnn_r18-scratch_fpn_ubn_demo.py'
DATA = ('--num-train', '64', '--num-val', '8', '--side-range', '96', '128')
WORLD_SIZE = 2
NORMS = ('BN', 'ComposedSyncBN', 'UBN', 'SyncUBN')
FAULTS = ('none', 'NaN in a sample', 'Inf in a sample', 'NaN at a layer', 'fp16 overflow')
FAULTY_RANK = 0
FAULTY_LAYER = 'backbone.layer2'
# A loss that is higher than that of a clean run by more than this share of it is in bold.
MARGIN = 0.1


class Outcome(NamedTuple):
    """What became of one run.

    Args:
        norm (str): Type of the norm layers.
        fault (str): What was put in.
        amp (bool): Whether it was trained in fp16 by autocast and with a gradient scaler.
        num_skipped (int): Optimizer steps that were skipped.
        finite_stats (bool): Whether all running statistics of all ranks are finite at the end.
        equal_stats (bool): Whether they are the same bytes on all ranks.
        finite_weights (bool): Whether all weights of all ranks are.
        loss (float): Training loss, mean over the last iterations and the ranks.
        eval_loss (float): Loss of held-out images in evaluation mode with rank 0's weights.
        iters (int): Iterations of the run.
        torch (str): Version of PyTorch.
    """

    norm: str
    fault: str
    amp: bool
    num_skipped: int
    finite_stats: bool
    equal_stats: bool
    finite_weights: bool
    loss: float
    eval_loss: float
    iters: int
    torch: str


@HOOKS.register_module()
class FaultHook(Hook):
    """Put a fault into some iterations of one rank.

    Args:
        fault (str): One of FAULTS.
        begin (int): First iteration with it, from 0.
        num_iters (int): Number of iterations with it.
    """

    def __init__(self, fault: str, begin: int, num_iters: int) -> None:
        self.fault = fault
        self.iterations = range(begin, begin + num_iters)
        self.losses: list[float] = []
        self._handle: Any = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Arm the fault."""
        if runner.iter not in self.iterations or runner.rank != FAULTY_RANK:
            return
        model = unwrap(runner.model)
        if self.fault.endswith('sample'):
            value = math.nan if self.fault.startswith('NaN') else math.inf

            def spoil(module: nn.Module, args: Any, output: Any) -> None:
                output['inputs'][0, :, 0, 0] = value

            self._handle = model.data_preprocessor.register_forward_hook(spoil)
        elif self.fault != 'none':
            # The largest float16 is 65504.
            factor = math.nan if self.fault.startswith('NaN') else 1e5

            def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return output * factor

            self._handle = model.get_submodule(FAULTY_LAYER).register_forward_hook(scale)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Disarm it and keep the loss."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.losses.append(float(outputs['loss']))


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """AmpOptimWrapper of mmengine for CPU, which it refuses: with a gradient scaler.

    Args:
        init_scale (float): Gradient scale at the start.
        **kwargs: As in OptimWrapper.
    """

    def __init__(self, init_scale: float = 2.0**10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=init_scale)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Scale the loss and go back from it."""
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Step unless the gradients overflowed."""
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='file to write; the page is written beside it')
    parser.add_argument('--iters', type=int, default=60, help='iterations of each run')
    parser.add_argument('--norms', nargs='+', choices=NORMS, default=NORMS)
    parser.add_argument('--faults', nargs='+', choices=FAULTS, default=FAULTS)
    parser.add_argument(
        '--report', action='store_true', help='write the page of a file that is there'
    )
    args = parser.parse_args()
    if args.report and not args.csv.exists():
        parser.error(f'{args.csv}: no such file')
    if 'none' not in args.faults:
        parser.error("--faults needs 'none' as well: the others are compared with the clean run")
    return args


def main() -> None:
    args = parse_args()
    if not args.report:
        write_outcomes(args.csv, measure(args))
    page = args.csv.with_suffix('.md')
    page.write_text(make_page(read_outcomes(args.csv)))
    print(f'Wrote {page}.')


def measure(args: argparse.Namespace) -> list[Outcome]:
    """Do all runs that the command line asks for, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, DEMO / 'make_demo_data.py', Path(folder) / 'data', *DATA]
        subprocess.run(command, check=True)
        context = torch.multiprocessing.get_context('spawn')
        queue = context.SimpleQueue()
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.start_processes(
            rank_main, (folder, port, args, queue), nprocs=WORLD_SIZE, start_method='spawn'
        )
        return queue.get()


def write_outcomes(path: Path, outcomes: list[Outcome]) -> None:
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(Outcome._fields)
        writer.writerows(outcomes)


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what :func:`write_outcomes` wrote."""
    kinds = {bool: lambda text: text == 'True', int: int, float: float, str: str}
    with path.open(newline='') as file:
        return [
            Outcome(*(kinds[kind](row[name]) for name, kind in Outcome.__annotations__.items()))
            for row in csv.DictReader(file)
        ]


def rank_main(rank: int, folder: str, port: int, args: argparse.Namespace, queue: Any) -> None:
    """Do all runs as one of the ranks; the first one reports."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    register_all_modules()
    MODELS.register_module(module=ComposedSyncBN)
    outcomes = []
    for norm, fault in itertools.product(args.norms, args.faults):
        amps = [False, True] if fault == 'none' else [fault == 'fp16 overflow']
        for amp in amps:
            outcomes.append(run(folder, norm, fault, amp, args.iters))
            if rank == 0:
                print(outcomes[-1], file=sys.stderr, flush=True)
    if rank == 0:
        queue.put(outcomes)
    dist.barrier()
    dist.destroy_process_group()


def run(folder: str, norm: str, fault: str, amp: bool, num_iters: int) -> Outcome:
    """Train once and look at what is left."""
    cfg = build_config(folder, norm, fault, amp, num_iters)
    prepare(cfg)
    runner = Runner.from_cfg(cfg)
    if amp:
        model = unwrap(runner.model)
        model.extract_feat = in_half(model.extract_feat)
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, FaultHook))
    model = unwrap(runner.model)
    stats = [b for name, b in model.named_buffers() if 'running' in name]
    stats = torch.cat([b.flatten() for b in stats])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    last = torch.tensor(hook.losses[-num_iters // 6 :]).mean()
    numbers = [stats.isfinite().all().float(), weights.isfinite().all().float(), last]
    gathered: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, (torch.stack(numbers), stats))
    finite_stats, finite_weights, _ = torch.stack([g[0] for g in gathered]).amin(0).tolist()
    info = runner.message_hub.runtime_info
    return Outcome(
        norm=norm.removeprefix('Composed'),
        fault=fault,
        amp=amp,
        num_skipped=info.get('num_skipped_steps', 0),
        finite_stats=bool(finite_stats),
        # Bytes, since NaN is not equal to itself.
        equal_stats=all(
            torch.equal(g[1].view(torch.int32), stats.view(torch.int32)) for g in gathered
        ),
        finite_weights=bool(finite_weights),
        loss=torch.stack([g[0][2] for g in gathered]).mean().item(),
        eval_loss=evaluation_loss(runner),
        iters=num_iters,
        torch=torch.__version__,
    )


def in_half(extract: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Let backbone and neck run in float16; mmcv's operators on CPU want float32."""

    def extract_in_half(*args: Any) -> tuple[Tensor, ...]:
        with torch.autocast('cpu', torch.float16):
            return tuple(feature.float() for feature in extract(*args))

    return extract_in_half


def build_config(folder: str, norm: str, fault: str, amp: bool, num_iters: int) -> Config:
    """Shrink the demo's config and give it a norm and a fault."""
    cfg = Config.fromfile(CONFIG)
    annotations = Path(folder) / 'data/annotations/instances_train.json'
    classes = tuple(entry['name'] for entry in json.loads(annotations.read_text())['categories'])
    # Merging takes _delete_ out, so that each place has a copy.
    norm_cfg = dict(type=norm, requires_grad=True, _delete_=True)
    if 'UBN' in norm:
        norm_cfg.update(condensation_threshold=0.6, warmup=num_iters // 6)
    cfg.merge_from_dict(
        dict(
            norm_cfg=dict(norm_cfg),
            model=dict(
                backbone=dict(base_channels=16, norm_cfg=dict(norm_cfg)),
                neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, norm_cfg=dict(norm_cfg)),
                rpn_head=dict(in_channels=32, feat_channels=32),
                roi_head=dict(
                    bbox_roi_extractor=dict(out_channels=32),
                    bbox_head=dict(in_channels=32, fc_out_channels=128, num_classes=len(classes)),
                    mask_roi_extractor=dict(out_channels=32),
                    mask_head=dict(
                        in_channels=32,
                        conv_out_channels=32,
                        num_classes=len(classes),
                        norm_cfg=dict(norm_cfg),
                    ),
                ),
                train_cfg=dict(rcnn=dict(sampler=dict(num=32))),
            ),
            launcher='pytorch',
            work_dir=f'{folder}/{norm}-{fault}-{amp}'.replace(' ', '-'),
            experiment_name=f'{norm}-{fault}-{amp}'.replace(' ', '-'),
            log_level='WARNING',
            train_cfg=dict(max_iters=num_iters, val_interval=10 * num_iters),
            default_hooks=dict(checkpoint=dict(interval=10 * num_iters)),
            custom_hooks=[dict(type='FaultHook', fault=fault, begin=num_iters // 3, num_iters=3)],
        )
    )
    cfg.train_pipeline[2].scale = cfg.test_pipeline[1].scale = (128, 128)
    for name in ('train', 'val'):
        dataloader = cfg[f'{name}_dataloader']
        dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
        dataloader.dataset.update(
            data_root=f'{folder}/data/',
            metainfo=dict(classes=classes),
            pipeline=cfg.train_pipeline,
        )
    # Held-out images with their truth, for the loss; mAP says nothing after so short a training.
    cfg.held_out = cfg.val_dataloader
    cfg.held_out.dataset.test_mode = False
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.001, by_epoch=False, end=10)]
    if amp:
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    return cfg


@torch.no_grad()
def evaluation_loss(runner: Runner) -> float:
    """Mean loss over the held-out images, with running statistics."""
    model = unwrap(runner.model)
    model.eval()
    torch.manual_seed(0)
    losses = []
    for batch in runner.build_dataloader(runner.cfg.held_out):
        batch = model.data_preprocessor(batch, True)
        losses.append(model.parse_losses(model(**batch, mode='loss'))[0].item())
    return sum(losses) / len(losses)


def make_table(rows: list[list[Any]]) -> str:
    """Return rows, the first of which is the header, as Markdown."""
    head, *body = rows
    return '\n'.join(
        f'| {" | ".join(map(str, row))} |' for row in [head, ['---'] * len(head), *body]
    )


def make_page(outcomes: list[Outcome]) -> str:
    """Return the tables of what was measured, as Markdown."""
    clean = {(o.norm, o.amp): o for o in outcomes if o.fault == 'none'}
    rows = []
    for outcome in outcomes:
        losses = []
        for name in ('loss', 'eval_loss'):
            loss, reference = (getattr(o, name) for o in (outcome, clean[outcome[0], outcome.amp]))
            change = (loss - reference) / reference
            is_lost = not change <= MARGIN
            text = f'{loss:.2f} ({change:+.0%})' if math.isfinite(loss) else 'NaN'
            losses.append(f'**{text}**' if is_lost else text)
        rows.append(
            [
                outcome.norm,
                outcome.fault + (' (fp16)' if outcome.amp and outcome.fault == 'none' else ''),
                outcome.num_skipped,
                'finite' if outcome.finite_stats else '**not finite**',
                'equal' if outcome.equal_stats else 'differ',
                'finite' if outcome.finite_weights else '**not finite**',
                *losses,
            ]
        )
    header = [
        'norm',
        'fault',
        'skipped steps',
        'running statistics',
        'between the ranks',
        'weights',
        'training loss',
        'evaluation loss',
    ]
    counts: list[list[Any]] = [
        [
            'norm',
            'runs with a fault',
            'running statistics',
            'weights',
            'training loss',
            'evaluation loss',
        ]
    ]
    for norm in dict.fromkeys(outcome.norm for outcome in outcomes):
        faulty = [o for o in outcomes if o.norm == norm and o.fault != 'none']
        counts.append(
            [
                norm,
                len(faulty),
                sum(not o.finite_stats for o in faulty),
                sum(not o.finite_weights for o in faulty),
                sum(not math.isfinite(o.loss) for o in faulty),
                sum(not math.isfinite(o.eval_loss) for o in faulty),
            ]
        )
    iters = outcomes[0].iters
    begin = iters // 3 + 1
    return f"""# Faults put into training

Made by `python benchmarks/inject_faults.py docs/faults.csv` (PyTorch {outcomes[0].torch}, CPU).

A small Mask R-CNN, {iters} iterations on generated data by {WORLD_SIZE} processes on gloo,
4 images each, one seed. In iterations {begin} to {begin + 2} rank {FAULTY_RANK}, whose model is
the one that is saved, has an image with a column of pixels that are not finite, or the output of
`{FAULTY_LAYER}` is multiplied by NaN there, or by 1e5 where backbone and neck run in float16
(largest value 65504; under autocast, with `torch.amp.GradScaler`). All norms are trained with
`NonFiniteStepHook`, which skips the optimizer's step. SyncBN is composed of operators, since
torch's own refuses CPU tensors; its formula and its exchange are the same.

Losses are the mean of the last sixth of the iterations, and of 8 held-out images in evaluation
mode with rank 0's model. In brackets the difference from the clean run of the same norm; what is
higher by more than {MARGIN:.0%}, or not finite, is in bold.

{make_table([header, *rows])}

Of the runs with a fault, those in which at the end something was not finite:

{make_table(counts)}
"""


if __name__ == '__main__':
    main()
