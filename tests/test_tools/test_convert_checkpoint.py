"""Conversion of checkpoint files, and runs that go on from them."""

import copy
import sys

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from tiny_config import load_tool
from torch import nn
from torch.utils.data import Dataset

from ubn_det import UBN, UBN2d, convert

EXTRAS = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')


@pytest.fixture
def tool(monkeypatch):
    """Run the tool in this process; returns what the new file holds."""
    module = load_tool('tools/convert_checkpoint.py', monkeypatch)

    def run(path, *arguments, out=None):
        out = path.with_suffix('.out.pth') if out is None else out
        monkeypatch.setattr(
            sys, 'argv', ['convert_checkpoint.py', str(path), str(out), *arguments]
        )
        module.main()
        return torch.load(out, weights_only=False)

    return run


class Toy(BaseModel):
    """BN in several places, other norms, a frozen layer and a shared one."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm(4))
        self.stem.requires_grad_(False)
        self.group = nn.GroupNorm(2, 4)
        conv = nn.Conv2d(4, 4, 1, bias=False)
        self.block = nn.ModuleDict(dict(conv=conv, bn=norm(4), ln=nn.LayerNorm(4)))
        self.twin = conv
        self.head = nn.Sequential(
            nn.Conv2d(4, 4, 1, bias=False), norm(4, eps=1e-3), nn.Conv2d(4, 2, 1)
        )

    def forward(self, x, mode='tensor'):
        x = self.group(self.stem(x)).relu()
        x = self.block['bn'](self.twin(self.block['conv'](x))).relu()
        x = self.block['ln'](x).relu()
        x = self.head(x)
        return dict(loss=x.square().mean()) if mode == 'loss' else x


class Noise(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(x=torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(index)))


def make_runner(folder, norm, max_iters, paramwise, optimizer, resume=None):
    model = Toy(norm)
    return Runner(
        model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            dataset=Noise(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=optimizer,
            **(
                dict(paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True))
                if paramwise
                else {}
            ),
        ),
        param_scheduler=[dict(type='MultiStepLR', by_epoch=False, milestones=[1], gamma=0.5)],
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max_iters),
            logger=dict(type='LoggerHook', interval=100),
        ),
        custom_hooks=[dict(type='EMAHook', update_buffers=True)],
        load_from=None if resume is None else str(resume),
        resume=resume is not None,
        experiment_name='_'.join(folder.parts[-2:]),
        log_level='ERROR',
    )


def states_by_name(runner):
    names = {id(p): n for n, p in runner.model.named_parameters()}
    return {names[id(p)]: s for p, s in runner.optim_wrapper.optimizer.state.items()}


@pytest.mark.parametrize('paramwise', [False, True])
@pytest.mark.parametrize(
    'optimizer',
    [dict(type='SGD', lr=0.1, momentum=0.9), dict(type='AdamW', lr=0.1)],
)
def test_run_of_bn_goes_on_as_ubn(tmp_path, tool, paramwise, optimizer):
    # A gate that never closes, so that a step of UBN is one of BN.
    def norm(*args, **kwargs):
        return UBN2d(*args, condensation_threshold=None, **kwargs)

    settings = dict(paramwise=paramwise, optimizer=dict(optimizer, weight_decay=0.01))
    first = make_runner(tmp_path / 'bn', nn.BatchNorm2d, 2, **settings)
    first.train()
    path = tmp_path / 'bn' / 'iter_2.pth'
    # mmengine leaves frozen parameters out where each has a group of its own.
    frozen = ['--frozen', 'stem.*'] if paramwise else []
    converted = tool(path, '--norm-cfg', 'type=UBN', *frozen, out=tmp_path / 'ubn.pth')
    (scheduler,) = converted['param_schedulers']
    # With a paramwise_cfg mmengine counts the wrapper's own settings as one more group.
    num_groups = len(converted['optimizer']['param_groups']) + paramwise
    assert len(scheduler['base_values']) == len(scheduler['_last_value']) == num_groups
    second = make_runner(tmp_path / 'ubn', norm, 3, **settings, resume=tmp_path / 'ubn.pth')
    # One step further, both.
    third = make_runner(tmp_path / 'on', nn.BatchNorm2d, 3, **settings, resume=path)
    for runner in (second, third):
        runner.train()
    assert second.iter == 3
    expected, found = third.model.state_dict(), second.model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    states = states_by_name(second)
    for name, state in states_by_name(third).items():
        for key, value in state.items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-4, atol=1e-5)
    # The new parameters train, those of frozen layers do not.
    assert {f'head.1.{extra}' for extra in EXTRAS} <= states.keys()
    groups = second.optim_wrapper.optimizer.param_groups
    names = [n for n, p in second.model.named_parameters() if p.requires_grad]
    assert len(groups) == (len(names) if paramwise else 1)
    assert {group['lr'] for group in groups} == {0.05}
    if paramwise:
        decay = dict(zip(names, (group['weight_decay'] for group in groups), strict=True))
        assert {decay[f'head.1.{name}'] for name in ('weight', *EXTRAS)} == {0}

    # And back, where the rectifiers are 0 still.
    back = tool(tmp_path / 'ubn.pth', '--norm-cfg', 'type=BN', *frozen)
    original = torch.load(path, weights_only=False)
    for key in ('state_dict', 'ema_state_dict'):
        assert list(back[key]) == list(original[key])
        torch.testing.assert_close(back[key], original[key], rtol=0, atol=0)
    assert back['param_schedulers'] == original['param_schedulers']
    back, original = back['optimizer'], original['optimizer']
    assert back['param_groups'] == original['param_groups']
    torch.testing.assert_close(back['state'], original['state'], rtol=0, atol=0)


def make_state(norm=nn.BatchNorm2d):
    model = Toy(norm)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.rand_like(tensor) + 1 if tensor.is_floating_point() else tensor + 7)
        if name.endswith(EXTRAS):
            tensor.zero_()
    return model.state_dict()


WAYS_TO_STORE = {
    'plain': lambda state: state,
    'dict': lambda state: dict(state),
    'Detectron2': lambda state: dict(model=state, iteration=3),
    'timm': lambda state: dict(arch='x', state_dict=state, state_dict_ema=dict(state)),
}


@pytest.mark.parametrize('way', WAYS_TO_STORE)
def test_state_dict_is_that_of_the_converted_model(tmp_path, tool, capsys, way):
    state = make_state()
    torch.save(WAYS_TO_STORE[way](state), tmp_path / 'bn.pth')
    converted = tool(tmp_path / 'bn.pth', '--norm-cfg', 'type=UBN', 'affine_kernel=3')
    assert capsys.readouterr().out.startswith('3 layers')
    model = Toy()
    model.load_state_dict(state)
    expected = convert(model, dict(affine_kernel=3)).state_dict()
    found = [converted]
    if way in ('Detectron2', 'timm'):
        found = [value for key, value in converted.items() if key not in ('iteration', 'arch')]
        assert list(converted) == list(WAYS_TO_STORE[way](state))
    for each in found:
        assert list(each) == list(expected)
        torch.testing.assert_close(dict(each), dict(expected), rtol=0, atol=0)
    if way == 'plain':
        assert converted._metadata == state._metadata


def test_other_norms_are_untouched_and_layers_can_be_chosen(tmp_path, tool):
    state = make_state()
    # As mmengine names the entries of an averaged model.
    average = dict(steps=torch.tensor(3)) | {f'module.{key}': v for key, v in state.items()}
    torch.save(dict(state_dict=state, ema_state_dict=average), tmp_path / 'bn.pth')
    converted = tool(tmp_path / 'bn.pth', '--select', 'block.*', 'head.1')
    for key, old, prefix in (
        ('state_dict', state, ''),
        ('ema_state_dict', average, 'module.'),
    ):
        new = converted[key].keys() - old.keys()
        layers = {name.rpartition('.')[0] for name in new}
        assert layers == {f'{prefix}block.bn', f'{prefix}head.1'}
        assert {name.rpartition('.')[2] for name in new} >= {*EXTRAS, 'condensation'}


def test_layers_without_affine_or_bias_and_old_ones_without_a_counter(tmp_path, tool):
    model = nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, bias=False), nn.BatchNorm2d(3).half()
    )
    state = model.state_dict()
    del state['0.num_batches_tracked']
    torch.save(state, tmp_path / 'bn.pth')
    converted = tool(tmp_path / 'bn.pth')
    expected = convert(copy.deepcopy(model)).state_dict()
    assert list(converted) == list(expected)
    assert {k: v.dtype for k, v in converted.items()} == {k: v.dtype for k, v in expected.items()}


@pytest.mark.parametrize('extra', EXTRAS)
def test_layer_that_is_no_bn_is_named_and_nothing_is_written(tmp_path, tool, extra):
    state = make_state(UBN2d)
    state[f'block.bn.{extra}'][2] = 1e-20
    torch.save(dict(state_dict=state), tmp_path / 'ubn.pth')
    with pytest.raises(SystemExit, match=rf'ubn\.pth: block\.bn: its {extra} is not 0'):
        tool(tmp_path / 'ubn.pth', '--norm-cfg', 'type=BN')
    assert [path.name for path in tmp_path.iterdir()] == ['ubn.pth']
    # The others can be converted.
    back = tool(tmp_path / 'ubn.pth', '--norm-cfg', 'type=BN', '--select', 'head.*', 'stem.*')
    left = {key.rpartition('.')[0] for key in back['state_dict'] if 'center_weight' in key}
    assert left == {'block.bn'}


def save_text(path):
    path.write_text('no checkpoint')


def save_without_bn(path):
    torch.save(nn.Sequential(nn.GroupNorm(1, 4), nn.LayerNorm(4)).state_dict(), path)


def save_ubn(path):
    torch.save(UBN(4).state_dict(), path)


def save_optimizer(path, change):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    change(state)
    torch.save(dict(model=model.state_dict(), optimizer=state), path)


def split_groups(state):
    (group,) = state['param_groups']
    params = group['params']
    state['param_groups'] = [{**group, 'params': params[:5]}, {**group, 'params': params[5:]}]


def break_shape(state):
    state['state'][9]['momentum_buffer'] = torch.zeros(9)


@pytest.mark.parametrize(
    ('save', 'arguments', 'message'),
    [
        (lambda path: None, [], 'x.pth: .*x.pth does not exist'),
        (save_text, [], 'is no checkpoint that torch.load can read'),
        (lambda path: torch.save([1], path), [], 'it holds a list and no state dict'),
        (save_without_bn, [], 'no layer of BN was found'),
        (save_ubn, [], 'no layer of BN was found'),
        (lambda path: torch.save(make_state(), path), ['--norm-cfg', 'type=BN'], 'layer of UBN'),
        (
            lambda path: torch.save(make_state(), path),
            ['--select', 'neck.*', 'x'],
            r'no layer of BN whose name matches neck\.\* or x was found',
        ),
        (
            lambda path: torch.save(make_state(), path),
            ['--norm-cfg', 'type=GN'],
            'type of norm_cfg must be one of',
        ),
        (
            lambda path: torch.save(make_state(), path),
            ['--norm-cfg', 'affine_kernel=2'],
            'stem.1: affine_kernel must be odd',
        ),
        (
            lambda path: save_optimizer(
                path, lambda state: state['param_groups'][0]['params'].pop()
            ),
            [],
            'has 14 parameters and the model 15.*--no-optimizer',
        ),
        (lambda path: save_optimizer(path, split_groups), [], 'several groups of several'),
        (lambda path: save_optimizer(path, break_shape), [], r'momentum_buffer of shape \(9,\)'),
        (
            lambda path: save_optimizer(path, lambda state: state.pop('state')),
            [],
            'is not that of one optimizer',
        ),
    ],
)
def test_errors_are_sentences_and_leave_no_file(tmp_path, tool, save, arguments, message):
    save(tmp_path / 'x.pth')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=message):
        tool(tmp_path / 'x.pth', *arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_optimizer_can_be_left_out(tmp_path, tool):
    save_optimizer(tmp_path / 'x.pth', split_groups)
    converted = tool(tmp_path / 'x.pth', '--no-optimizer')
    assert list(converted) == ['model']


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path, tool):
    torch.save(make_state(), tmp_path / 'bn.pth')
    (tmp_path / 'folder').write_text('in the way')
    with pytest.raises(SystemExit, match='convert_checkpoint.py: error'):
        tool(tmp_path / 'bn.pth', out=tmp_path / 'folder' / 'x.pth')
    # In place is safe too.
    assert 'stem.1.center_weight' in tool(tmp_path / 'bn.pth', out=tmp_path / 'bn.pth')
