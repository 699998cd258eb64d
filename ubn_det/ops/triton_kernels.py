"""UBN's steps on a GPU, in Triton: float32, bfloat16 and float16, kernels of 1, 3 and 5.

Formulas, per plane (n, c) of x with M pixels; ``w_c, w_s, b_s`` and the neighbourhood count
``gain`` times, and what flows back to them is divided by it::

    m, v     mean and biased variance of the plane, m' = (1 + w_c) m
    mean = mean_n(m'), var = mean_n(v) + mean_n((m' - mean)^2)
    r = rsqrt(var + eps), k = (m' - mean) r, g = 2 sigmoid(w_s k + b_s)
    u = x - m, h = g r u + g k, zero outside of the plane
    y[p] = sum_d K[d] h[p + d] + bias,     K = neighbourhood, with weight added to its centre

Each step is one function. Its launches, in this order:

================ ======================== ============================== =====================
step             kernel                   reads                          writes
================ ======================== ============================== =====================
moments          _moments_kernel          x                              moments of chunks,
                                                                         products of samples
                 _summary_kernel          moments of chunks, and x       m, summary
                                          where more than 8 samples are
                                          scored
normalize        _normalize_kernel        x, m                           y
evaluate         _normalize_kernel        x                              y
... large planes _moments_kernel first    x                              moments of chunks
reduce           _reduce_kernel           dy, x, m                       sums over chunks
                 _channel_kernel          sums over chunks               sums, d_statistics,
                                                                         parameters' gradients
... without m    _moments_kernel first    x                              moments of chunks
input_gradient   _input_gradient_kernel   dy, x, m, sums, d_statistics   dx, d_center_weight
update           _update_kernel           summary, buffers               buffers
================ ======================== ============================== =====================

So a training forward makes 4 launches, scored or not, and a backward 3, or 4 without m. All but
the maps (x, y and their gradients) is small, and each map that a kernel reads or writes passes
through memory once: rows that two chunks read are in a cache by then.

Grids are one-dimensional: a program takes a *chunk* of the planes of CHANNELS channels, for some
samples in turn. A chunk is a strip of *lines* by PIXELS columns. With a neighbourhood, lines are
the rows of the map: a program goes down its strip and keeps in registers what earlier rows have
added to later ones, so that a row is loaded once per column of the kernel, and no index is ever
divided. Without one, the plane is a string of lines of PIXELS values each. Contiguous and
channels_last maps differ in two strides alone. What programs share they leave in memory for the
next launch, in float32, where it is added up in a fixed order: results do not change from run to
run.

Nothing here waits for the device, and launches depend on shapes alone: a graph can capture them.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# As many warps as keep 132 multiprocessors busy twice over; more are given more to do each.
_WARPS = 8192

# Samples up to here are compared by their products while their moments are taken; more, by the sum
# of their unit vectors, one more read of x.
_MAX_PAIRWISE = 8

# Channels of a program that adds up partial results: 32 bytes, the least that memory delivers.
_SUMMARY_CHANNELS = 8

# Chunks of a plane whose means a program adds up at a time, where these are not summarized yet.
_MEAN_CHUNKS = 16

# A plane up to this many values is read again from the cache by the program that took its mean.
_MAX_VISIT = 2048

# No kernel is compiled for one of these that happens to be 1 or a multiple of 16: maps differ from
# batch to batch. What loads gain from a multiple, ALIGNED says.
_SIZES = (
    'N',
    'C',
    'M',
    'W',
    'rows',
    'blocks',
    'lines',
    'chunks',
    'samples',
    'pieces',
    'parts',
    'mean_chunks',
    'mean_pixels',
    'channel_programs',
    'vector_programs',
    'num_warmup',
    'patience',
)
_jit = functools.partial(triton.jit, do_not_specialize=_SIZES)


# ------------------------------------------------------------------------------------------------
# Parts of kernels
# ------------------------------------------------------------------------------------------------


@_jit
def _program(index, N, chunks, samples, CHANNELS: tl.constexpr):
    """Chunk, range of samples and channels (CHANNELS, 1) of a program."""
    groups = tl.cdiv(N, samples)
    chunk = index % chunks
    first = index // chunks % groups * samples
    c = index // chunks // groups * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    return chunk, first, tl.minimum(first + samples, N), c


@_jit
def _strides(C, M, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr):
    """Strides of a map from sample to sample, channel to channel (both int64), pixel to pixel.

    ALIGNED is a divisor of the larger one of the last two, for the compiler to know: it loads as
    many values at once.
    """
    if CHANNELS_LAST:
        pixel = C // ALIGNED * ALIGNED
        sample = pixel.to(tl.int64) * M
        channel = tl.full((), 1, tl.int64)
    else:
        channel = (M // ALIGNED * ALIGNED).to(tl.int64)
        sample = channel * C
        pixel = tl.full((), 1, tl.int32)
    return sample, channel, pixel


@_jit
def _columns(valid, row, first, last, W, M, SIZE: tl.constexpr):
    """How many columns a row has: 0 where it is not one of first to last, or has no channel."""
    num = W
    if SIZE == 1:
        num = tl.maximum(M - row * W, 0)
    return tl.where(valid & (row >= first) & (row < last), num, 0)


@_jit
def _within(column, columns):
    """Whether 0 <= column < columns, in one comparison."""
    return column.to(tl.uint32, bitcast=True) < columns.to(tl.uint32, bitcast=True)


@_jit
def _load_row(pointers, column, columns, pixel, SIZE: tl.constexpr):
    """A row, once per column of the kernel: SIZE tensors, 0 outside of the map."""
    values = ()
    for j in tl.static_range(SIZE):
        there = _within(column + (j - SIZE // 2), columns)
        value = tl.load(pointers + (j - SIZE // 2) * pixel, mask=there, other=0)
        values += (value.to(tl.float32),)
    return values


@_jit
def _load_channels(pointer, c, valid, FACTOR, DEFAULT: tl.constexpr):
    """FACTOR times a parameter's values of the channels c, DEFAULT where there is no parameter."""
    if pointer is None:
        values = tl.full(c.shape, DEFAULT, tl.float32)
    else:
        values = FACTOR * tl.load(pointer + c, mask=valid, other=0).to(tl.float32)
    return values


@_jit
def _load_taps(weight, neighbour_weight, c, valid, gain, SIZE: tl.constexpr):
    """K: SIZE * SIZE tensors shaped as c."""
    taps = ()
    for i in tl.static_range(SIZE * SIZE):
        if neighbour_weight is None:
            tap = tl.zeros(c.shape, tl.float32)
        else:
            pointer = neighbour_weight + c * (SIZE * SIZE) + i
            tap = gain * tl.load(pointer, mask=valid, other=0).to(tl.float32)
        if i == SIZE * SIZE // 2:
            tap += _load_channels(weight, c, valid, 1.0, 1.0)
        taps += (tap,)
    return taps


@_jit
def _zeros(NUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """NUM tensors of zeros."""
    values = ()
    for _ in tl.static_range(NUM):
        values += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return values


@_jit
def _gate(m, mean, var, w_c, w_s, b_s, eps):
    """Planes' r, k and g."""
    r = tl.rsqrt(var + eps)
    k = ((1 + w_c) * m - mean) * r
    g = 2 * tl.sigmoid(w_s * k + b_s)
    return r, k, g


@_jit
def _gate_gradient(s0, s1, r, k, g, w_s):
    """Gradients of the gate's logit and of k, from the plane's sums S0 and S1."""
    d_logit = (r * s1 + k * s0) * g * (1 - g / 2)
    return d_logit, g * s0 + d_logit * w_s


@_jit
def _moments_of(
    planes, others, pixel, column, valid, first, last, M, PIXELS: tl.constexpr, AXIS: tl.constexpr
):
    """Mean and sum of squared deviations of the pixels in lines first to last.

    The deviations are from the mean of the first line, so nothing cancels: where that is far off,
    so are the values from each other. ``planes`` points to the planes that are ``valid``, all of
    size 1 along AXIS, where ``column`` counts the PIXELS of a line. ``others`` are further planes,
    in a tuple: the products with them, pixel by pixel, are the third result.
    """
    step = pixel.to(tl.int64) * PIXELS
    offset = column * pixel
    inside = valid & (first * PIXELS + column < M)
    x = tl.load(planes + first * step + offset, mask=inside, other=0).to(tl.float32)
    count = tl.minimum(M, last * PIXELS) - first * PIXELS
    shift = tl.sum(x, AXIS, keep_dims=True) / tl.minimum(count, PIXELS)
    total = tl.zeros(x.shape, tl.float32)
    squares = tl.zeros(x.shape, tl.float32)
    products = ()
    for _ in tl.static_range(len(others)):
        products += (tl.zeros(x.shape, tl.float32),)
    for line in range(first, last):
        u = tl.where(inside, x - shift, 0)
        total += u
        squares += u * u
        sums = ()
        for i in tl.static_range(len(others)):
            other = tl.load(others[i] + line * step + offset, mask=inside, other=0)
            sums += (products[i] + x * other.to(tl.float32),)
        products = sums
        # The next line is on its way while this one is added.
        inside = valid & ((line + 1) * PIXELS + column < M) & (line + 1 < last)
        x = tl.load(planes + (line + 1) * step + offset, mask=inside, other=0).to(tl.float32)
    total = tl.sum(total, AXIS, keep_dims=True)
    squares = tl.sum(squares, AXIS, keep_dims=True)
    return shift + total / count, squares - total * (total / count), products


@_jit
def _plane_mean(
    means, n, c, valid, mean, N, C, M, mean_chunks, mean_pixels, MEAN_CHUNKS: tl.constexpr
):
    """Means (CHANNELS, 1) of a sample's planes, from those of their chunks.

    ``means`` is (chunks, N, C), ``mean_pixels`` the size of a chunk but the last. None where m is
    no more than a point to count from: ``mean`` then takes its place.
    """
    if means is None:
        m = mean
    else:
        pointer = means + n * C.to(tl.int64) + c
        m = tl.load(pointer, mask=valid, other=0).to(tl.float32)
        if MEAN_CHUNKS > 1:
            base = m
            step = N.to(tl.int64) * C
            for start in range(0, mean_chunks, MEAN_CHUNKS):
                chunk = start + tl.arange(0, MEAN_CHUNKS)[None, :]
                there = valid & (chunk < mean_chunks)
                part = tl.load(pointer + chunk * step, mask=there, other=0)
                count = tl.minimum(M - chunk * mean_pixels, mean_pixels)
                share = count.to(tl.float32) / M
                m += tl.sum(tl.where(there, share * (part - base), 0), 1, keep_dims=True)
    return m


# ------------------------------------------------------------------------------------------------
# Kernels, forward
# ------------------------------------------------------------------------------------------------


@_jit
def _moments_kernel(
    x,
    means,
    deviations,
    squares,
    products,
    arrived,
    N,
    C,
    M,
    rows,
    lines,
    chunks,
    SAMPLES: tl.constexpr,
    SHIFTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Moments of the chunks of planes, and what their samples' score needs.

    With SHIFTS, SAMPLES covers all samples: sample n is multiplied with n + 1, n + 2, ..., from
    the cache, so that every pair meets.

    Writes means and deviations (chunks, N, C); the samples' sums of squares, ``squares``
    (pieces, N); products (pieces, SHIFTS, SAMPLES); and 0 to ``arrived``, the next launch's
    counter. All but the means may be None.
    """
    index = tl.program_id(0)
    if squares is not None:
        if index == 0:
            tl.store(arrived, 0)
    chunk = index % chunks
    groups = tl.cdiv(N, SAMPLES)
    block = index // chunks // groups
    piece = block * chunks + chunk
    n = index // chunks % groups * SAMPLES + tl.arange(0, SAMPLES)[:, None, None]
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :, None]
    column = tl.arange(0, PIXELS)[None, None, :]
    valid = (n < N) & (c < C)

    sample, channel, pixel = _strides(C, M, CHANNELS_LAST, ALIGNED)
    planes = x + n * sample + c * channel
    others = ()
    for i in tl.static_range(SHIFTS):
        others += (x + (n + i + 1) % N * sample + c * channel,)
    first = chunk * lines
    last = tl.minimum(first + lines, rows)
    mean, deviation, sums = _moments_of(
        planes, others, pixel, column, valid, first, last, M, PIXELS, 2
    )

    place = (chunk * N + n).to(tl.int64) * C + c
    tl.store(means + place, mean, mask=valid)
    if deviations is not None:
        tl.store(deviations + place, deviation, mask=valid)
    n = tl.reshape(n, (SAMPLES,))
    if squares is not None:
        count = tl.minimum(M, last * PIXELS) - first * PIXELS
        square = tl.where(valid, deviation + count * mean * mean, 0)
        square = tl.sum(tl.sum(square, 2), 1)
        tl.store(squares + piece.to(tl.int64) * N + n, square, mask=n < N)
    for i in tl.static_range(SHIFTS):
        product = tl.sum(tl.sum(sums[i], 2), 1)
        tl.store(products + (piece * SHIFTS + i) * SAMPLES + n, product)


@_jit
def _summarize_channels(
    index,
    means,
    deviations,
    m,
    summary,
    center_weight,
    gain,
    N,
    C,
    M,
    chunks,
    mean_pixels,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The part of _summary_kernel that takes mean and var of CHANNELS channels."""
    c = index * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    lane = tl.arange(0, CHUNKS)[None, :, None]
    planes = N.to(tl.int64) * C
    scale = 1 + _load_channels(center_weight, c, c < C, gain, 0.0)
    # All counts from the first chunk of the first plane, so that a large offset costs no digits.
    origin = tl.load(means + c, mask=c < C, other=0)

    # Chan's formula, one plane more in every lane of SAMPLES.
    average = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    variance = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    spread = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    num = 0
    for start in range(0, N, SAMPLES):
        n = start + tl.arange(0, SAMPLES)[:, None, None]
        valid = (n < N) & (c < C)
        place = n * C.to(tl.int64) + c
        base = tl.load(means + place, mask=valid, other=0)
        offset = tl.zeros((SAMPLES, CHUNKS, CHANNELS), tl.float32)
        for start_chunk in range(0, chunks, CHUNKS):
            chunk = start_chunk + lane
            there = valid & (chunk < chunks)
            part = tl.load(means + place + chunk * planes, mask=there, other=0)
            count = tl.minimum(M - chunk * mean_pixels, mean_pixels).to(tl.float32)
            offset += tl.where(there, count * (part - base), 0)
        offset = tl.sum(offset, 1, keep_dims=True) / M
        deviation = tl.zeros((SAMPLES, CHUNKS, CHANNELS), tl.float32)
        for start_chunk in range(0, chunks, CHUNKS):
            chunk = start_chunk + lane
            there = valid & (chunk < chunks)
            part = tl.load(means + place + chunk * planes, mask=there, other=0)
            count = tl.minimum(M - chunk * mean_pixels, mean_pixels).to(tl.float32)
            shift = part - base - offset
            deviation += tl.load(deviations + place + chunk * planes, mask=there, other=0)
            deviation += tl.where(there, count * shift * shift, 0)
        tl.store(m + place, base + offset, mask=valid)
        num += 1
        delta = tl.where(valid, scale * (base - origin + offset) - average, 0)
        average += delta / num
        spread += delta * delta * (1 - 1.0 / num)
        variance += tl.sum(deviation, 1, keep_dims=True) / M

    # Planes that went into each lane.
    lane = tl.arange(0, SAMPLES)[:, None, None]
    num = (N - lane + SAMPLES - 1) // SAMPLES
    offset = tl.sum(num * average, 0, keep_dims=True) / N
    spread += num * (average - offset) * (average - offset)
    var = tl.sum(variance + spread, 0, keep_dims=True) / N
    tl.store(summary + c, scale * origin + offset, mask=c < C)
    tl.store(summary + C + c, var, mask=c < C)


@_jit
def _inverse_norm(square):
    """1 / |x_i|, 0 of a sample of zeros."""
    return tl.where(square == 0, 0, tl.rsqrt(square))


@_jit
def _score_products(
    squares, products, pair_sum, N, pieces, SAMPLES: tl.constexpr, SHIFTS: tl.constexpr
):
    """The part of _summary_kernel that scores few samples, by their products."""
    PIECES: tl.constexpr = 1024 // SAMPLES
    lane = tl.arange(0, SAMPLES)[None, :]
    total = tl.zeros((1, SAMPLES), tl.float32)
    for shift in range(1, SHIFTS + 1):
        product = tl.zeros((PIECES, SAMPLES), tl.float32)
        square = tl.zeros((PIECES, SAMPLES), tl.float32)
        other = tl.zeros((PIECES, SAMPLES), tl.float32)
        for start in range(0, pieces, PIECES):
            piece = start + tl.arange(0, PIECES)[:, None]
            there = (piece < pieces) & (lane < N)
            line = squares + piece.to(tl.int64) * N
            square += tl.load(line + lane, mask=there, other=0)
            other += tl.load(line + (lane + shift) % N, mask=there, other=0)
            line = products + (piece * SHIFTS + shift - 1) * SAMPLES
            product += tl.load(line + lane, mask=there, other=0)
        product = tl.sum(product, 0, keep_dims=True)
        product *= _inverse_norm(tl.sum(square, 0, keep_dims=True))
        product *= _inverse_norm(tl.sum(other, 0, keep_dims=True))
        # Both orders of a pair count; halfway round, either sample has met the other already.
        total += tl.where(2 * shift == N, 1, 2) * product
    tl.store(pair_sum, tl.sum(total))


@_jit
def _score_vectors(
    index,
    x,
    squares,
    vectors,
    arrived,
    pair_sum,
    N,
    C,
    M,
    pieces,
    vector_programs,
    SAMPLES: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The part of _summary_kernel that scores many samples, by the sum of their unit vectors.

    A program adds VALUES of their entries; the one that comes last adds up the programs.
    """
    PIECES: tl.constexpr = 16
    entries = (C.to(tl.int64) * M) // ALIGNED * ALIGNED
    entry = index.to(tl.int64) * VALUES + tl.arange(0, VALUES)[None, :]
    vector = tl.zeros((SAMPLES, VALUES), tl.float32)
    num = tl.zeros((SAMPLES, 1), tl.int32)
    for start in range(0, N, SAMPLES):
        n = start + tl.arange(0, SAMPLES)[:, None]
        value = tl.load(x + n * entries + entry, mask=(n < N) & (entry < entries), other=0)
        square = tl.zeros((SAMPLES, PIECES), tl.float32)
        for first in range(0, pieces, PIECES):
            piece = first + tl.arange(0, PIECES)[None, :]
            there = (n < N) & (piece < pieces)
            square += tl.load(squares + piece.to(tl.int64) * N + n, mask=there, other=0)
        square = tl.sum(square, 1, keep_dims=True)
        vector += value.to(tl.float32) * _inverse_norm(square)
        num += (square != 0).to(tl.int32)
    vector = tl.sum(vector, 0)
    tl.store(vectors + index, tl.sum(vector * vector))

    # The sum has to be in memory before the program counts as arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem='acq_rel') == vector_programs - 1:
        BLOCK: tl.constexpr = 1024
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vector_programs, BLOCK):
            place = first + tl.arange(0, BLOCK)
            # Past the first cache, which does not see what others wrote.
            total += tl.load(
                vectors + place, mask=place < vector_programs, other=0, cache_modifier='.cg'
            )
        tl.store(pair_sum, tl.sum(total) - tl.sum(num))


@_jit
def _summary_kernel(
    x,
    means,
    deviations,
    squares,
    products,
    vectors,
    arrived,
    m,
    summary,
    center_weight,
    gain,
    N,
    C,
    M,
    chunks,
    mean_pixels,
    pieces,
    channel_programs,
    vector_programs,
    SCORED: tl.constexpr,
    SHIFTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr,
    VECTOR_SAMPLES: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What a process says of its batch, from the moments of the chunks.

    The first ``channel_programs`` take CHANNELS channels each, the rest the score. Writes m (N, C)
    and summary (2 C + 3,), and for itself ``vectors`` (vector_programs,).
    """
    index = tl.program_id(0)
    if index == 0:
        tl.store(summary + 2 * C, N.to(tl.float32) * M)
        if SCORED:
            tl.store(summary + 2 * C + 2, N.to(tl.float32) * (N - 1))
        else:
            tl.store(summary + 2 * C + 1, 0.0)
            tl.store(summary + 2 * C + 2, 0.0)
    if index < channel_programs:
        _summarize_channels(
            index,
            means,
            deviations,
            m,
            summary,
            center_weight,
            gain,
            N,
            C,
            M,
            chunks,
            mean_pixels,
            SAMPLES,
            CHUNKS,
            CHANNELS,
        )
    elif SCORED:
        if SHIFTS > 0:
            _score_products(
                squares, products, summary + 2 * C + 1, N, pieces, VECTOR_SAMPLES, SHIFTS
            )
        else:
            _score_vectors(
                index - channel_programs,
                x,
                squares,
                vectors,
                arrived,
                summary + 2 * C + 1,
                N,
                C,
                M,
                pieces,
                vector_programs,
                VECTOR_SAMPLES,
                VALUES,
                ALIGNED,
            )


@_jit
def _normalize_kernel(
    x,
    y,
    means,
    mean,
    var,
    weight,
    bias,
    center_weight,
    scale_weight,
    scale_bias,
    neighbour_weight,
    eps,
    gain,
    N,
    C,
    M,
    W,
    rows,
    blocks,
    lines,
    chunks,
    samples,
    mean_chunks,
    mean_pixels,
    MEAN_CHUNKS: tl.constexpr,
    VISIT: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Output y in chunks of planes.

    With VISIT, a program takes the whole of its planes, and their means itself.
    """
    PAD: tl.constexpr = SIZE // 2
    chunk, first, last, c = _program(tl.program_id(0), N, chunks, samples, CHANNELS)
    valid = c < C
    column = tl.arange(0, PIXELS)[None, :]
    sample, channel, pixel = _strides(C, M, CHANNELS_LAST, ALIGNED)
    width = W
    if SIZE == 1:
        width = PIXELS
    line = pixel.to(tl.int64) * width
    mu = _load_channels(mean, c, valid, 1.0, 0.0)
    variance = _load_channels(var, c, valid, 1.0, 0.0)
    w_c = _load_channels(center_weight, c, valid, gain, 0.0)
    w_s = _load_channels(scale_weight, c, valid, gain, 0.0)
    b_s = _load_channels(scale_bias, c, valid, gain, 0.0)
    shift = _load_channels(bias, c, valid, 1.0, 0.0)
    taps = _load_taps(weight, neighbour_weight, c, valid, gain, SIZE)
    top = chunk // blocks * lines
    bottom = tl.minimum(top + lines, rows)
    first_block = chunk % blocks
    last_block = first_block + 1
    if VISIT:
        first_block = 0
        last_block = blocks

    for n in range(first, last):
        offset = n * sample + c * channel
        if VISIT:
            flat = tl.cdiv(M, PIXELS)
            m = _moments_of(x + offset, (), pixel, column, valid, 0, flat, M, PIXELS, 1)[0]
        else:
            m = _plane_mean(means, n, c, valid, mu, N, C, M, mean_chunks, mean_pixels, MEAN_CHUNKS)
        r, k, g = _gate(m, mu, variance, w_c, w_s, b_s, eps)
        A = g * r
        B = g * k
        for block in range(first_block, last_block):
            p = block * PIXELS + column
            source = x + offset + p * pixel.to(tl.int64)
            target = y + offset + p * pixel.to(tl.int64)
            # Rows row - PAD to row + PAD of y, from the rows of x so far.
            sums = ()
            for _ in tl.static_range(SIZE):
                sums += (tl.zeros((CHANNELS, PIXELS), tl.float32) + shift,)
            for start in range(top - PAD, bottom + PAD, ROWS):
                # No load passes a store, so those of several rows come first.
                loaded = ()
                for i in tl.static_range(ROWS):
                    columns = _columns(valid, start + i, 0, rows, width, M, SIZE)
                    loaded += _load_row(source + (start + i) * line, p, columns, pixel, SIZE)
                for row in tl.static_range(ROWS):
                    columns = _columns(valid, start + row, 0, rows, width, M, SIZE)
                    for j in tl.static_range(SIZE):
                        h = A * (loaded[row * SIZE + j] - m) + B
                        h = tl.where(_within(p + (j - PAD), columns), h, 0)
                        more = ()
                        for i in tl.static_range(SIZE):
                            more += (sums[i] + taps[(SIZE - 1 - i) * SIZE + j] * h,)
                        sums = more
                    done = start + row - PAD
                    columns = _columns(valid, done, top, bottom, width, M, SIZE)
                    value = sums[0].to(y.dtype.element_ty)
                    tl.store(target + done * line, value, mask=_within(p, columns))
                    sums = sums[1:] + (tl.zeros((CHANNELS, PIXELS), tl.float32) + shift,)


@_jit
def _move(running, batch, c, valid, factor, is_open):
    """Move a running statistic to the batch's, or leave it as it is to the bit."""
    old = tl.load(running + c, mask=valid, other=0)
    kind = tl.float32
    if running.dtype.element_ty == tl.float64:
        kind = tl.float64
    new = (1 - factor).to(kind) * old.to(kind) + factor.to(kind) * batch.to(kind)
    tl.store(running + c, tl.where(is_open, new.to(old.dtype), old), mask=valid)


@_jit
def _update_kernel(
    running_mean,
    running_var,
    tracked_pointer,
    condensation,
    condensed_pointer,
    readmitted_pointer,
    consecutive_pointer,
    score_mean,
    score_var,
    scored_pointer,
    summary,
    momentum,
    threshold,
    z,
    weight,
    C,
    num_warmup,
    patience,
    HAS_MOMENTUM: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    FOLLOWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Decide whether the gate is open, and move what a layer keeps; one program."""
    lanes = tl.arange(0, CHANNELS)
    broken = tl.zeros((CHANNELS,), tl.int32)
    for start in range(0, 2 * C, CHANNELS):
        value = tl.load(summary + start + lanes, mask=start + lanes < 2 * C, other=0)
        # False of NaN too.
        broken += (tl.abs(value) < float('inf')).to(tl.int32) ^ 1
    count = tl.load(summary + 2 * C)
    pair_sum = tl.load(summary + 2 * C + 1)
    pairs = tl.load(summary + 2 * C + 2)
    tracked = tl.load(tracked_pointer)
    condensed = tl.load(condensed_pointer)
    readmitted = tl.load(readmitted_pointer)
    consecutive = tl.load(consecutive_pointer)
    if FOLLOWS:
        scored = tl.load(scored_pointer)
        mean_of_scores = tl.load(score_mean)
        var_of_scores = tl.load(score_var)
        wide = tl.float64 if score_mean.dtype.element_ty == tl.float64 else tl.float32
        threshold += mean_of_scores.to(wide) + z * tl.sqrt(var_of_scores.to(wide))
    # All threads have read the counters before the first one writes them.
    tl.debug_barrier()

    seen = count > 0
    finite = (tl.sum(broken) == 0) & (count > 1)
    over = tl.full((), 0, tl.int1)
    if HAS_THRESHOLD:
        score = pair_sum / pairs
        # NaN stays NaN in both.
        score = tl.where(score > 1, 1.0, score)
        score = tl.where(score < -1, -1.0, score)
        defined = seen & (pairs > 0) & (score == score)
        tl.store(condensation, tl.where(defined, score, tl.load(condensation)))
        if HAS_MOMENTUM:
            over = defined & (score > threshold) & (tracked >= num_warmup)
            if FOLLOWS:
                over = over & (scored >= num_warmup)
    starved = consecutive >= patience
    is_open = seen & finite & ((over == 0) | starved)
    # Whether the row of closed batches ends with this one.
    is_end = is_open
    if FOLLOWS:
        is_end = is_open & defined & (over == 0)
        is_let_in = is_open & defined
        scored += is_let_in.to(tl.int64)
        tl.store(scored_pointer, scored)
        share = tl.maximum(1 / tl.maximum(scored, 1).to(wide), weight)
        distance = score - mean_of_scores.to(wide)
        new_mean = mean_of_scores.to(wide) + share * distance
        new_var = (1 - share) * (var_of_scores.to(wide) + share * distance * distance)
        kind = mean_of_scores.dtype
        tl.store(score_mean, tl.where(is_let_in, new_mean.to(kind), mean_of_scores))
        tl.store(score_var, tl.where(is_let_in, new_var.to(kind), var_of_scores))
    is_closed = seen & (is_open == 0)
    tl.store(readmitted_pointer, readmitted + (is_open & over).to(tl.int64))
    tl.store(condensed_pointer, condensed + is_closed.to(tl.int64))
    consecutive = tl.where(is_end, 0, consecutive + is_closed.to(tl.int64))
    tl.store(consecutive_pointer, consecutive)
    tracked += is_open.to(tl.int64)
    tl.store(tracked_pointer, tracked)

    factor = momentum
    if not HAS_MOMENTUM:
        factor = 1 / tl.maximum(tracked, 1).to(tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + lanes
        valid = c < C
        mean = tl.load(summary + c, mask=valid, other=0)
        var = tl.load(summary + C + c, mask=valid, other=0)
        _move(running_mean, mean, c, valid, factor, is_open)
        _move(running_var, var * (count / (count - 1)), c, valid, factor, is_open)


# ------------------------------------------------------------------------------------------------
# Kernels, backward
# ------------------------------------------------------------------------------------------------


@_jit
def _reduce_kernel(
    dy,
    x,
    means,
    m_pointer,
    mean,
    var,
    weight,
    center_weight,
    scale_weight,
    scale_bias,
    neighbour_weight,
    sums,
    taps_sums,
    eps,
    gain,
    N,
    C,
    M,
    W,
    rows,
    blocks,
    lines,
    chunks,
    samples,
    mean_chunks,
    mean_pixels,
    MEAN_CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sums over chunks of planes: S0 and S1 of each plane, dK and d_bias over the samples.

    b[d] comes from the sums of dy over the rows, column by column: what the border of the map
    leaves out is then a matter of which columns are added in the end.

    Writes sums (2, chunks, N, C); taps_sums (parts, SIZE * SIZE + 1, C), dK and then d_bias; and m
    (N, C). The last two may be None.
    """
    PAD: tl.constexpr = SIZE // 2
    chunk, first, last, c = _program(tl.program_id(0), N, chunks, samples, CHANNELS)
    valid = c < C
    column = chunk % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
    sample, channel, pixel = _strides(C, M, CHANNELS_LAST, ALIGNED)
    width = W
    if SIZE == 1:
        width = PIXELS
    line = pixel.to(tl.int64) * width
    mu = _load_channels(mean, c, valid, 1.0, 0.0)
    variance = _load_channels(var, c, valid, 1.0, 0.0)
    w_c = _load_channels(center_weight, c, valid, gain, 0.0)
    w_s = _load_channels(scale_weight, c, valid, gain, 0.0)
    b_s = _load_channels(scale_bias, c, valid, gain, 0.0)
    top = chunk // blocks * lines
    bottom = tl.minimum(top + lines, rows)

    d_taps = _zeros(SIZE * SIZE, CHANNELS, 1)
    d_bias = tl.zeros((CHANNELS, 1), tl.float32)
    for n in range(first, last):
        m = _plane_mean(means, n, c, valid, mu, N, C, M, mean_chunks, mean_pixels, MEAN_CHUNKS)
        place = n * C.to(tl.int64) + c
        if m_pointer is not None:
            tl.store(m_pointer + place, m, mask=valid & (chunk == 0))
        offset = n * sample + c * channel + column * pixel.to(tl.int64)
        products = _zeros(SIZE * SIZE, CHANNELS, PIXELS)
        total = tl.zeros((CHANNELS, PIXELS), tl.float32)
        # dy in the rows row - PAD to row + PAD.
        window = _zeros(SIZE, CHANNELS, PIXELS)
        for row in tl.range(top - PAD, bottom + PAD, loop_unroll_factor=ROWS):
            ahead = row + PAD
            columns = _columns(valid, ahead, top, bottom, width, M, SIZE)
            value = _load_row(dy + offset + ahead * line, column, columns, pixel, 1)[0]
            window = window[1:] + (value,)
            total += value
            columns = _columns(valid, row, 0, rows, width, M, SIZE)
            loaded = _load_row(x + offset + row * line, column, columns, pixel, SIZE)
            shifted = ()
            for j in tl.static_range(SIZE):
                there = _within(column + (j - PAD), columns)
                shifted += (tl.where(there, loaded[j] - m, 0),)
            more = ()
            for i in tl.static_range(SIZE):
                for j in tl.static_range(SIZE):
                    more += (products[i * SIZE + j] + window[SIZE - 1 - i] * shifted[j],)
            products = more

        # The rows of dy that reach p + d in row i - PAD from their own: all but the first PAD - i,
        # or the last i - PAD.
        above = (total,)
        below = (total,)
        for i in tl.static_range(PAD):
            columns = _columns(valid, i, top, bottom, width, M, SIZE)
            value = _load_row(dy + offset + i * line, column, columns, pixel, 1)[0]
            above = (above[0] - value,) + above
            row = rows - 1 - i
            columns = _columns(valid, row, top, bottom, width, M, SIZE)
            value = _load_row(dy + offset + row * line, column, columns, pixel, 1)[0]
            below += (below[i] - value,)
        borders = above + below[1:]

        # Again for each plane, from the cache: they would take registers from the loop.
        taps = _load_taps(weight, neighbour_weight, c, valid, gain, SIZE)
        r, k, g = _gate(m, mu, variance, w_c, w_s, b_s, eps)
        s0 = tl.zeros((CHANNELS, 1), tl.float32)
        s1 = tl.zeros((CHANNELS, 1), tl.float32)
        more = ()
        for i in tl.static_range(SIZE):
            for j in tl.static_range(SIZE):
                border = borders[i]
                if j != PAD:
                    columns = tl.where(valid, width, 0)
                    border = tl.where(_within(column + (j - PAD), columns), border, 0)
                border = tl.sum(border, 1, keep_dims=True)
                product = tl.sum(products[i * SIZE + j], 1, keep_dims=True)
                s0 += taps[i * SIZE + j] * border
                s1 += taps[i * SIZE + j] * product
                more += (d_taps[i * SIZE + j] + g * (r * product + k * border),)
        d_taps = more
        d_bias += tl.sum(total, 1, keep_dims=True)
        planes = N.to(tl.int64) * C
        place += chunk * planes
        tl.store(sums + place, s0, mask=valid)
        tl.store(sums + chunks * planes + place, s1, mask=valid)

    if taps_sums is not None:
        part = (first // samples * chunks + chunk).to(tl.int64)
        target = taps_sums + part * (SIZE * SIZE + 1) * C + c
        for i in tl.static_range(SIZE * SIZE):
            tl.store(target + i * C, d_taps[i], mask=valid)
        tl.store(target + SIZE * SIZE * C, d_bias, mask=valid)


@_jit
def _sum_channels(
    c,
    sums,
    m,
    mean,
    var,
    center_weight,
    scale_weight,
    scale_bias,
    plane_sums,
    d_statistics,
    d_scale_weight,
    d_scale_bias,
    eps,
    gain,
    N,
    C,
    chunks,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The part of _channel_kernel that sums over samples."""
    planes = N.to(tl.int64) * C
    mu = _load_channels(mean, c, c < C, 1.0, 0.0)
    variance = _load_channels(var, c, c < C, 1.0, 0.0)
    w_c = _load_channels(center_weight, c, c < C, gain, 0.0)
    w_s = _load_channels(scale_weight, c, c < C, gain, 0.0)
    b_s = _load_channels(scale_bias, c, c < C, gain, 0.0)
    r = tl.rsqrt(variance + eps)
    sum_k = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    sum_r = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    sum_logit = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    sum_slope = tl.zeros((SAMPLES, 1, CHANNELS), tl.float32)
    for start in range(0, N, SAMPLES):
        n = start + tl.arange(0, SAMPLES)[:, None, None]
        valid = (n < N) & (c < C)
        place = n * C.to(tl.int64) + c
        s0 = tl.zeros((SAMPLES, CHUNKS, CHANNELS), tl.float32)
        s1 = tl.zeros((SAMPLES, CHUNKS, CHANNELS), tl.float32)
        for first in range(0, chunks, CHUNKS):
            chunk = first + tl.arange(0, CHUNKS)[None, :, None]
            there = valid & (chunk < chunks)
            s0 += tl.load(sums + chunk * planes + place, mask=there, other=0)
            s1 += tl.load(sums + (chunks + chunk) * planes + place, mask=there, other=0)
        s0 = tl.sum(s0, 1, keep_dims=True)
        s1 = tl.sum(s1, 1, keep_dims=True)
        tl.store(plane_sums + place, s0, mask=valid)
        tl.store(plane_sums + planes + place, s1, mask=valid)
        value = tl.load(m + place, mask=valid, other=0)
        _, k, g = _gate(value, mu, variance, w_c, w_s, b_s, eps)
        d_logit, d_k = _gate_gradient(s0, s1, r, k, g, w_s)
        sum_k += tl.where(valid, d_k, 0)
        sum_r += tl.where(valid, g * s1 + d_k * ((1 + w_c) * value - mu), 0)
        sum_logit += tl.where(valid, d_logit, 0)
        sum_slope += tl.where(valid, d_logit * k, 0)
    d_mean = -r * tl.sum(sum_k, 0, keep_dims=True)
    d_var = -0.5 * r * r * r * tl.sum(sum_r, 0, keep_dims=True)
    tl.store(d_statistics + c, d_mean, mask=c < C)
    tl.store(d_statistics + C + c, d_var, mask=c < C)
    if d_scale_weight is not None:
        tl.store(d_scale_weight + c, tl.sum(sum_slope, 0, keep_dims=True) / gain, mask=c < C)
        tl.store(d_scale_bias + c, tl.sum(sum_logit, 0, keep_dims=True) / gain, mask=c < C)


@_jit
def _channel_kernel(
    sums,
    taps_sums,
    m,
    mean,
    var,
    center_weight,
    scale_weight,
    scale_bias,
    plane_sums,
    d_statistics,
    d_weight,
    d_bias,
    d_scale_weight,
    d_scale_bias,
    d_neighbour_weight,
    eps,
    gain,
    N,
    C,
    chunks,
    parts,
    SIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    TASKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Everything per channel in the backward, CHANNELS by program, from the sums of chunks.

    Of TASKS programs for the same channels, the first sums over samples, the others take a tap
    of K each, and the last one d_bias. Reads sums and taps_sums as _reduce_kernel writes them.
    Writes plane_sums (2, N, C), d_statistics (2, C) and the gradients that are not None.
    """
    index = tl.program_id(0)
    c = index // TASKS * CHANNELS + tl.arange(0, CHANNELS)
    task = index % TASKS
    if task > 0:
        tap = task - 1
        total = tl.zeros((PARTS, CHANNELS), tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)[:, None]
            place = (part.to(tl.int64) * (TASKS - 1) + tap) * C + c[None, :]
            there = (part < parts) & (c < C)[None, :]
            total += tl.load(taps_sums + place, mask=there, other=0)
        total = tl.sum(total, 0)
        if d_neighbour_weight is not None:
            there = (c < C) & (tap < SIZE * SIZE)
            tl.store(d_neighbour_weight + c * (SIZE * SIZE) + tap, total / gain, mask=there)
        if d_weight is not None:
            tl.store(d_weight + c, total, mask=(c < C) & (tap == SIZE * SIZE // 2))
        if d_bias is not None:
            tl.store(d_bias + c, total, mask=(c < C) & (tap == SIZE * SIZE))
    else:
        _sum_channels(
            c[None, None, :],
            sums,
            m,
            mean,
            var,
            center_weight,
            scale_weight,
            scale_bias,
            plane_sums,
            d_statistics,
            d_scale_weight,
            d_scale_bias,
            eps,
            gain,
            N,
            C,
            chunks,
            SAMPLES,
            CHUNKS,
            CHANNELS,
        )


@_jit
def _plane_gradient(
    s0, s1, m, mean, var, w_c, w_s, b_s, d_mean, d_var, share, eps, M, BATCH: tl.constexpr
):
    """A, P, Q and dm' of planes; BATCH where the statistics are the batch's."""
    r, k, g = _gate(m, mean, var, w_c, w_s, b_s, eps)
    _, d_k = _gate_gradient(s0, s1, r, k, g, w_s)
    d_centered = d_k * r
    P = tl.zeros_like(m)
    if BATCH:
        d_centered += M * share * (d_mean + 2 * d_var * ((1 + w_c) * m - mean))
        P += 2 * d_var * share
    A = g * r
    return A, P, ((1 + w_c) * d_centered - A * s0) / M, d_centered


@_jit
def _input_gradient_kernel(
    dy,
    x,
    dx,
    m_pointer,
    mean,
    var,
    sums,
    d_statistics,
    share_pointer,
    weight,
    center_weight,
    scale_weight,
    scale_bias,
    neighbour_weight,
    d_center_weight,
    eps,
    gain,
    N,
    C,
    M,
    W,
    rows,
    blocks,
    lines,
    chunks,
    samples,
    channel_programs,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Gradient of x in chunks of planes; the first ``channel_programs`` take d_center_weight.

    They add up PLANES samples at a time. Without d_statistics and share the statistics are
    constants, and x is not read.
    """
    BATCH: tl.constexpr = d_statistics is not None
    PAD: tl.constexpr = SIZE // 2
    index = tl.program_id(0)
    of_channels = index < channel_programs
    chunk, first, last, c = _program(
        tl.maximum(index - channel_programs, 0), N, chunks, samples, CHANNELS
    )
    if of_channels:
        c = index * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    valid = c < C
    planes = N.to(tl.int64) * C
    mu = _load_channels(mean, c, valid, 1.0, 0.0)
    variance = _load_channels(var, c, valid, 1.0, 0.0)
    w_c = _load_channels(center_weight, c, valid, gain, 0.0)
    w_s = _load_channels(scale_weight, c, valid, gain, 0.0)
    b_s = _load_channels(scale_bias, c, valid, gain, 0.0)
    d_mean = _load_channels(d_statistics, c, valid, 1.0, 0.0)
    d_var = tl.zeros_like(d_mean)
    share = 0.0
    if BATCH:
        d_var = _load_channels(d_statistics + C, c, valid, 1.0, 0.0)
        share = tl.load(share_pointer)

    if of_channels:
        if d_center_weight is not None:
            total = tl.zeros((CHANNELS, PLANES), tl.float32)
            for start in range(0, N, PLANES):
                n = start + tl.arange(0, PLANES)[None, :]
                place = n * C.to(tl.int64) + c
                there = valid & (n < N)
                s0 = tl.load(sums + place, mask=there, other=0)
                s1 = tl.load(sums + planes + place, mask=there, other=0)
                m = tl.load(m_pointer + place, mask=there, other=0)
                d_centered = _plane_gradient(
                    s0, s1, m, mu, variance, w_c, w_s, b_s, d_mean, d_var, share, eps, M, BATCH
                )[3]
                total += tl.where(there, d_centered * m, 0)
            total = tl.sum(total, 1, keep_dims=True) / gain
            tl.store(d_center_weight + c, total, mask=valid)
    else:
        column = chunk % blocks * PIXELS + tl.arange(0, PIXELS)[None, :]
        sample, channel, pixel = _strides(C, M, CHANNELS_LAST, ALIGNED)
        width = W
        if SIZE == 1:
            width = PIXELS
        line = pixel.to(tl.int64) * width
        taps = _load_taps(weight, neighbour_weight, c, valid, gain, SIZE)
        top = chunk // blocks * lines
        bottom = tl.minimum(top + lines, rows)
        for n in range(first, last):
            place = n * C.to(tl.int64) + c
            s0 = tl.load(sums + place, mask=valid, other=0)
            s1 = tl.load(sums + planes + place, mask=valid, other=0)
            m = tl.load(m_pointer + place, mask=valid, other=0)
            A, P, Q = _plane_gradient(
                s0, s1, m, mu, variance, w_c, w_s, b_s, d_mean, d_var, share, eps, M, BATCH
            )[:3]
            offset = n * sample + c * channel + column * pixel.to(tl.int64)
            # dh in the rows row - PAD to row + PAD, from the rows of dy so far.
            gradients = _zeros(SIZE, CHANNELS, PIXELS)
            for start in range(top - PAD, bottom + PAD, ROWS):
                # As in _normalize_kernel.
                loaded = ()
                values = ()
                for i in tl.static_range(ROWS):
                    at = offset + (start + i) * line
                    columns = _columns(valid, start + i, 0, rows, width, M, SIZE)
                    loaded += _load_row(dy + at, column, columns, pixel, SIZE)
                    if BATCH:
                        columns = _columns(valid, start + i - PAD, top, bottom, width, M, SIZE)
                        values += _load_row(x + at - PAD * line, column, columns, pixel, 1)
                for row in tl.static_range(ROWS):
                    for j in tl.static_range(SIZE):
                        more = ()
                        for i in tl.static_range(SIZE):
                            tap = taps[i * SIZE + SIZE - 1 - j]
                            more += (gradients[i] + tap * loaded[row * SIZE + j],)
                        gradients = more
                    done = start + row - PAD
                    value = A * gradients[0] + Q
                    if BATCH:
                        value += P * (values[row] - m)
                    value = value.to(dx.dtype.element_ty)
                    columns = _columns(valid, done, top, bottom, width, M, SIZE)
                    there = _within(column, columns)
                    tl.store(dx + offset + done * line, value, mask=there)
                    gradients = gradients[1:] + _zeros(1, CHANNELS, PIXELS)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


_PARAMETERS = (
    'weight',
    'bias',
    'center_weight',
    'scale_weight',
    'scale_bias',
    'neighbour_weight',
)

# By the neighbourhood's size: how many values of each kind a thread holds, in how many channels at
# most, and how many rows are loaded at a time. Chosen by the registers that the compiler reports:
# twice the values take 167 to 238 of them in the reduction with k = 3, these 126 and 128.
_NORMALIZE_TILES = {1: (8, 2, 2), 3: (4, 2, 2), 5: (2, 1, 2)}
_REDUCE_TILES = {1: (4, 2, 2), 3: (2, 1, 1), 5: (2, 1, 1)}
_INPUT_GRADIENT_TILES = {1: (8, 2, 2), 3: (4, 2, 2), 5: (2, 1, 2)}


class _Plan(NamedTuple):
    """How a pass goes over the planes.

    Args:
        programs (int): How many programs there are.
        sizes (dict): The sizes among its kernel's arguments.
        constants (dict): Its constants, and how many warps a program has.
    """

    programs: int
    sizes: dict
    constants: dict


def _is_channels_last(x: Tensor) -> bool:
    """Whether a map is; planes of one value are better read as if they were."""
    if x.is_contiguous():
        return x.shape[2] * x.shape[3] == 1
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f'x has to be contiguous or channels_last, got strides {x.stride()}')
    return True


def _like(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t`` in x's memory format."""
    if x.is_contiguous():
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last)


def _size(parameters: tuple[Tensor | None, ...]) -> int:
    """Size of the neighbourhood."""
    neighbour_weight = parameters[-1]
    return 1 if neighbour_weight is None else neighbour_weight.shape[-1]


def _by_name(parameters: tuple[Tensor | None, ...]) -> dict:
    return dict(zip(_PARAMETERS, parameters, strict=True))


def _power(value: int) -> int:
    return triton.next_power_of_2(value)


def _string_tile(x: Tensor, size: int, most: int | None = None) -> tuple[int, int]:
    """CHANNELS and PIXELS where a plane is a string.

    They make about ``size`` values, few of them void; in no more channels than put ``most`` into
    each of 128 threads.
    """
    C, M = x.shape[1], x.shape[2] * x.shape[3]
    if _is_channels_last(x):
        channels = min(_power(C), max(64, size // _power(M)))
        return channels, min(_power(M), size // channels)
    pixels = min(_power(M), size)
    choices = [pixels]
    while pixels > 32:
        pixels //= 2
        choices.append(pixels)
    covered = [triton.cdiv(M, choice) * choice for choice in choices]
    limit = 1.25 * min(covered)
    pixels = next(choice for choice, all in zip(choices, covered, strict=True) if all <= limit)
    if most is not None:
        size = min(size, 128 * most * _aligned(x))
    return min(_power(C), max(size // pixels, 1)), pixels


def _row_tile(x: Tensor, per_thread: int, most: int) -> tuple[int, int, int]:
    """CHANNELS, PIXELS and warps where a plane is a map of rows.

    A thread holds ``per_thread`` values of each kind, in no more than ``most`` channels: it also
    holds their kernels.
    """
    C, W = x.shape[1], x.shape[3]
    if _is_channels_last(x):
        channels = min(32, _power(C))
        return channels, min(_power(W), 128 * per_thread // channels), 4
    # Void columns cost as much as those that neighbouring blocks read twice. One warp adds up its
    # pixels without the others.
    choices = [128, 64, 32, 16, 8]
    choices = [choice for choice in choices if choice <= 32 * per_thread]
    pixels = min(choices, key=lambda choice: triton.cdiv(W, choice) * (choice + 8))
    channels = min(32 * per_thread // pixels, max(32 * most // pixels, 1) if pixels < 32 else most)
    return min(_power(C), channels), pixels, 1


def _summary_tile(N: int, chunks: int) -> tuple[int, int]:
    """How many samples and chunks are added up at a time."""
    chunks = min(_power(chunks), 256)
    return min(_power(N), max(128 // chunks, 1)), chunks


def _aligned(x: Tensor) -> int:
    """How many values a load of a thread may take, as the shape allows.

    Not more than 2 of a channels_last map: they are as many channels.
    """
    C, M = x.shape[1], x.shape[2] * x.shape[3]
    return math.gcd(C, 2) if _is_channels_last(x) else math.gcd(M, 16)


def _plan(
    x: Tensor, size: int, per_thread: int, most: int, rows: int, is_whole: bool = False
) -> _Plan:
    """Plan a pass over x.

    Args:
        x (Tensor): The map.
        size (int): Of the neighbourhood.
        per_thread (int): How many values of each kind a thread holds.
        most (int): In how many channels at most.
        rows (int): How many rows are loaded at a time.
        is_whole (bool): Whether a program takes planes as a whole.
    """
    (N, C, H, W), M = x.shape, x.shape[2] * x.shape[3]
    if size == 1:
        warps = 4
        channels, pixels = _string_tile(x, 32 * warps * per_thread, most)
        num_rows, blocks, shortest = triton.cdiv(M, pixels), 1, 2
    else:
        channels, pixels, warps = _row_tile(x, per_thread, most)
        # A strip also reads the rows next to it.
        num_rows, blocks, shortest = H, triton.cdiv(W, pixels), 16
    wanted = _WARPS // warps
    programs = N * triton.cdiv(C, channels)
    strips = 1
    if not is_whole:
        programs *= blocks
        strips = max(min(wanted // programs, triton.cdiv(num_rows, shortest)), 1)
    lines = triton.cdiv(num_rows, strips)
    strips = triton.cdiv(num_rows, lines)
    samples = min(max(programs * strips // wanted, 1), N)
    chunks = 1 if is_whole else strips * blocks
    return _Plan(
        chunks * triton.cdiv(N, samples) * triton.cdiv(C, channels),
        dict(
            N=N,
            C=C,
            M=M,
            W=W,
            rows=num_rows,
            blocks=blocks,
            lines=lines,
            chunks=chunks,
            samples=samples,
        ),
        dict(
            SIZE=size,
            CHANNELS=channels,
            PIXELS=pixels,
            # A mean takes registers of its own.
            ROWS=1 if is_whole else min(rows, lines),
            CHANNELS_LAST=_is_channels_last(x),
            ALIGNED=_aligned(x) if size == 1 else 1,
            num_warps=warps,
        ),
    )


class _Chunks(NamedTuple):
    """Moments of the chunks of planes, and what a score needs.

    Args:
        means (Tensor): (chunks, N, C).
        pixels (int): Size of a chunk but the last.
        deviations, squares, products, arrived: As _moments_kernel writes them.
        shifts (int): How many other samples each has been multiplied with.
    """

    means: Tensor
    pixels: int
    deviations: Tensor | None = None
    squares: Tensor | None = None
    products: Tensor | None = None
    arrived: Tensor | None = None
    shifts: int = 0


def _mean_arguments(m: Tensor | _Chunks | None) -> dict:
    """How kernels take the means of planes, which may be in chunks yet."""
    if isinstance(m, _Chunks):
        chunks = len(m.means)
        return dict(
            means=m.means,
            mean_chunks=chunks,
            mean_pixels=m.pixels,
            MEAN_CHUNKS=min(_power(chunks), _MEAN_CHUNKS),
        )
    return dict(means=m, mean_chunks=1, mean_pixels=1, MEAN_CHUNKS=1)


def _take_chunks(x: Tensor, is_scored: bool = False, has_deviations: bool = False) -> _Chunks:
    """Launch _moments_kernel."""
    N, C, M = *x.shape[:2], x.shape[2] * x.shape[3]
    shifts = N // 2 if is_scored and N <= _MAX_PAIRWISE else 0
    # Of more shifts, more products are kept.
    size = 512 if shifts > 1 else 1024
    samples = _power(N) if shifts else 1
    channels, pixels = _string_tile(x, size // samples)
    if not shifts:
        samples = min(_power(N), max(size // (channels * pixels), 1))
    rows = triton.cdiv(M, pixels)
    blocks = triton.cdiv(C, channels)
    programs = triton.cdiv(N, samples) * blocks
    # Every program of the next launch would have to add up the chunks of a plane for itself,
    # where that is not the one that summarizes them.
    most = 1024 if has_deviations else 64
    chunks = min(max(_WARPS // 4 // programs, 1), triton.cdiv(rows, 2), most)
    lines = triton.cdiv(rows, chunks)
    chunks = triton.cdiv(rows, lines)

    def scratch(*shape, when=True, dtype=torch.float32):
        return x.new_empty(shape, dtype=dtype) if when else None

    taken = _Chunks(
        scratch(chunks, N, C),
        lines * pixels,
        scratch(chunks, N, C, when=has_deviations),
        scratch(blocks * chunks, N, when=is_scored),
        scratch(blocks * chunks, shifts, samples, when=shifts > 0),
        scratch(1, when=is_scored, dtype=torch.int32),
        shifts,
    )
    with torch.cuda.device_of(x):
        _moments_kernel[(programs * chunks,)](
            x,
            taken.means,
            taken.deviations,
            taken.squares,
            taken.products,
            taken.arrived,
            N=N,
            C=C,
            M=M,
            rows=rows,
            lines=lines,
            chunks=chunks,
            SAMPLES=samples,
            SHIFTS=shifts,
            CHANNELS=channels,
            PIXELS=pixels,
            CHANNELS_LAST=_is_channels_last(x),
            ALIGNED=_aligned(x),
        )
    return taken


def moments(
    x: Tensor, center_weight: Tensor | None, gain: float, is_scored: bool
) -> tuple[Tensor, Tensor]:
    """Take the means of all planes, and what the batch says of itself; 2 launches.

    Args:
        x (Tensor): (N, C, H, W), contiguous or channels_last; float32, bfloat16 or float16.
        center_weight (Tensor | None): (C,).
        gain (float): How much rectifiers count.
        is_scored (bool): Whether to take how alike the samples are.

    Returns:
        tuple[Tensor, Tensor]: m (N, C) and the summary (2 C + 3,): mean (C), var (C), count,
        pair_sum, num_pairs; float32.
    """
    N, C, M = *x.shape[:2], x.shape[2] * x.shape[3]
    m = x.new_empty((N, C), dtype=torch.float32)
    if x.numel() == 0:
        return m.zero_(), m.new_zeros(2 * C + 3)
    is_scored = is_scored and N > 1
    taken = _take_chunks(x, is_scored, has_deviations=True)
    chunks = len(taken.means)
    summary = m.new_empty(2 * C + 3)

    channels = _SUMMARY_CHANNELS
    samples, sum_chunks = _summary_tile(N, chunks)
    channel_programs = triton.cdiv(C, channels)
    values = min(max(_power(C * M // 2048 + 1), 32), 1024)
    vector_programs = 0
    if is_scored:
        vector_programs = 1 if taken.shifts else triton.cdiv(C * M, values)
    with torch.cuda.device_of(x):
        _summary_kernel[(channel_programs + vector_programs,)](
            x,
            taken.means,
            taken.deviations,
            taken.squares,
            taken.products,
            m.new_empty(vector_programs) if is_scored else None,
            taken.arrived,
            m,
            summary,
            center_weight,
            gain,
            N=N,
            C=C,
            M=M,
            chunks=chunks,
            mean_pixels=taken.pixels,
            pieces=len(taken.squares) if is_scored else 0,
            channel_programs=channel_programs,
            vector_programs=vector_programs,
            SCORED=is_scored,
            SHIFTS=taken.shifts,
            CHUNKS=sum_chunks,
            CHANNELS=channels,
            SAMPLES=samples,
            VECTOR_SAMPLES=_power(N) if taken.shifts else min(_power(N), 4096 // values),
            VALUES=values,
            ALIGNED=math.gcd(C * M, 16),
            num_warps=8,
        )
    return m, summary


def normalize(
    x: Tensor,
    m: Tensor,
    mean: Tensor,
    var: Tensor,
    parameters: tuple[Tensor | None, ...],
    eps: float,
    gain: float,
) -> Tensor:
    """Normalize by the given statistics; 1 launch.

    Args:
        x (Tensor): (N, C, H, W), contiguous or channels_last; float32, bfloat16 or float16.
        m (Tensor): Means of the planes, (N, C), float32.
        mean (Tensor): (C,), of the centered planes.
        var (Tensor): (C,), biased.
        parameters (tuple[Tensor | None, ...]): weight, bias, center_weight, scale_weight,
            scale_bias, each (C,), and neighbour_weight (C, 1, k, k), k = 3 or 5; None where off.
        eps (float): Added to ``var``.
        gain (float): How much rectifiers count.

    Returns:
        Tensor: y, as x in shape, type and memory format.
    """
    return _normalize(x, m, mean, var, parameters, eps, gain)


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    parameters: tuple[Tensor | None, ...],
    eps: float,
    gain: float,
) -> Tensor:
    """Normalize by running statistics: 1 launch, or 2 where planes are large.

    Args:
        x (Tensor): As in :func:`normalize`.
        mean (Tensor): (C,), in any floating-point type.
        var (Tensor): (C,), in any floating-point type.
        parameters (tuple[Tensor | None, ...]): As in :func:`normalize`.
        eps (float): Added to ``var``.
        gain (float): How much rectifiers count.

    Returns:
        Tensor: y, as x in shape, type and memory format.
    """
    _, _, center_weight, scale_weight, _, _ = parameters
    if center_weight is None and scale_weight is None:
        # A plane's own mean cancels.
        return _normalize(x, None, mean, var, parameters, eps, gain)
    if x.shape[2] * x.shape[3] <= _MAX_VISIT:
        return _normalize(x, None, mean, var, parameters, eps, gain, is_visit=True)
    return _normalize(x, _take_chunks(x), mean, var, parameters, eps, gain)


def _normalize(x, m, mean, var, parameters, eps, gain, is_visit=False) -> Tensor:
    """Launch _normalize_kernel, with m, its chunks, or None where it takes them itself."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    size = _size(parameters)
    plan = _plan(x, size, *_NORMALIZE_TILES[size], is_visit)
    with torch.cuda.device_of(x):
        _normalize_kernel[(plan.programs,)](
            x,
            y,
            mean=mean,
            var=var,
            **_by_name(parameters),
            eps=eps,
            gain=gain,
            VISIT=is_visit,
            **_mean_arguments(m),
            **plan.sizes,
            **plan.constants,
        )
    return y


def reduce(
    dy: Tensor,
    x: Tensor,
    m: Tensor | None,
    mean: Tensor,
    var: Tensor,
    parameters: tuple[Tensor | None, ...],
    eps: float,
    gain: float,
) -> tuple[Tensor | None, ...]:
    """Take from dy and x what all gradients need; 2 launches, 3 without m.

    Args:
        dy (Tensor): Gradient of y, of its shape and type; copied where its memory format is not
            that of x.
        x (Tensor): As in :func:`normalize`.
        m (Tensor | None): Means of the planes, (N, C), float32; None to take them from x again.
        mean (Tensor): What normalized, (C,).
        var (Tensor): What normalized, (C,).
        parameters (tuple[Tensor | None, ...]): As in :func:`normalize`.
        eps (float): Added to ``var``.
        gain (float): How much rectifiers count; gradients of the stored ones are divided by it.

    Returns:
        tuple[Tensor | None, ...]: m; sums (2, N, C), those of dh and of dh u over each plane;
        d_statistics (2, C), the gradients of ``mean`` and ``var``; and the gradients of weight,
        bias, scale_weight, scale_bias and neighbour_weight, None where there is none. All float32.
    """
    weight, bias, _, scale_weight, _, neighbour_weight = parameters
    N, C = x.shape[:2]

    def scratch(*shape, when=True):
        return x.new_empty(shape, dtype=torch.float32) if when else None

    sums, d_statistics = scratch(2, N, C), scratch(2, C)
    gradients = [None if p is None else scratch(*p.shape) for p in (weight, bias, *parameters[3:])]
    if x.numel() == 0:
        m = scratch(N, C).zero_() if m is None else m
        for t in (sums, d_statistics, *gradients):
            if t is not None:
                t.zero_()
        return m, sums, d_statistics, *gradients

    size = _size(parameters)
    plan = _plan(x, size, *_REDUCE_TILES[size])
    chunks, groups = plan.sizes['chunks'], triton.cdiv(N, plan.sizes['samples'])
    taken = _take_chunks(x) if m is None else m
    chunk_sums = scratch(2, chunks, N, C)
    has_taps = any(p is not None for p in (weight, bias, neighbour_weight))
    taps_sums = scratch(groups * chunks, size * size + 1, C, when=has_taps)
    means = scratch(N, C) if m is None else m
    named = _by_name(parameters)
    del named['bias']
    with torch.cuda.device_of(x):
        _reduce_kernel[(plan.programs,)](
            _like(dy, x),
            x,
            m_pointer=means if m is None else None,
            mean=mean,
            var=var,
            **named,
            sums=chunk_sums,
            taps_sums=taps_sums,
            eps=eps,
            gain=gain,
            **_mean_arguments(taken),
            **plan.sizes,
            **plan.constants,
        )
        channels = _SUMMARY_CHANNELS
        tasks = size * size + 2 if has_taps else 1
        samples, sum_chunks = _summary_tile(N, chunks)
        _channel_kernel[(triton.cdiv(C, channels) * tasks,)](
            chunk_sums,
            taps_sums,
            means,
            mean,
            var,
            *parameters[2:5],
            sums,
            d_statistics,
            *gradients,
            eps=eps,
            gain=gain,
            N=N,
            C=C,
            chunks=chunks,
            parts=groups * chunks,
            SIZE=size,
            SAMPLES=samples,
            CHUNKS=sum_chunks,
            PARTS=min(_power(groups * chunks), 512),
            TASKS=tasks,
            CHANNELS=channels,
            num_warps=8,
        )
    return means, sums, d_statistics, *gradients


def input_gradient(
    dy: Tensor,
    x: Tensor,
    m: Tensor,
    mean: Tensor,
    var: Tensor,
    parameters: tuple[Tensor | None, ...],
    sums: Tensor,
    d_statistics: Tensor | None,
    share: Tensor | None,
    eps: float,
    gain: float,
) -> tuple[Tensor, Tensor | None]:
    """Take the gradients of x and center_weight; 1 launch.

    Args:
        dy (Tensor): As in :func:`reduce`.
        x (Tensor): As in :func:`reduce`.
        m (Tensor): (N, C), as :func:`reduce` returns it.
        mean (Tensor): What normalized, (C,).
        var (Tensor): What normalized, (C,).
        parameters (tuple[Tensor | None, ...]): As in :func:`normalize`.
        sums (Tensor): (2, N, C), as :func:`reduce` returns it.
        d_statistics (Tensor | None): Gradients of ``mean`` and ``var``, (2, C), over all
            processes; None where the statistics are constants, as in evaluation.
        share (Tensor | None): 1 / values per channel, over all processes; 0-dim, float32. None
            with ``d_statistics``.
        eps (float): Added to ``var``.
        gain (float): How much rectifiers count.

    Returns:
        tuple[Tensor, Tensor | None]: dx, as x in shape, type and memory format, and
        d_center_weight (C,), float32, None where there is none.
    """
    dx = torch.empty_like(x)
    center_weight = parameters[2]
    d_center_weight = None
    if center_weight is not None:
        d_center_weight = sums.new_empty(center_weight.shape)
    if x.numel() == 0:
        return dx, None if d_center_weight is None else d_center_weight.zero_()
    size = _size(parameters)
    plan = _plan(x, size, *_INPUT_GRADIENT_TILES[size])
    channel_programs = 0
    if center_weight is not None:
        channel_programs = triton.cdiv(x.shape[1], plan.constants['CHANNELS'])
    named = _by_name(parameters)
    del named['bias']
    with torch.cuda.device_of(x):
        _input_gradient_kernel[(channel_programs + plan.programs,)](
            _like(dy, x),
            x,
            dx,
            m,
            mean=mean,
            var=var,
            sums=sums,
            d_statistics=d_statistics,
            share_pointer=share,
            **named,
            d_center_weight=d_center_weight,
            eps=eps,
            gain=gain,
            channel_programs=channel_programs,
            PLANES=min(_power(x.shape[0]), max(512 // plan.constants['CHANNELS'], 1)),
            **plan.sizes,
            **plan.constants,
        )
    return dx, d_center_weight


def train(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    eps: float,
    gain: float,
    is_scored: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch by its own statistics: :func:`moments`, then :func:`normalize`.

    Args:
        x (Tensor): As in :func:`moments`.
        parameters (tuple[Tensor | None, ...]): As in :func:`normalize`.
        eps (float): Added to the variance.
        gain (float): How much rectifiers count.
        is_scored (bool): As in :func:`moments`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: y, m and the summary.
    """
    m, summary = moments(x, parameters[2], gain, is_scored)
    mean, var = summary[:-3].chunk(2)
    return normalize(x, m, mean, var, parameters, eps, gain), m, summary


def backward(
    dy: Tensor,
    x: Tensor,
    m: Tensor | None,
    mean: Tensor,
    var: Tensor,
    parameters: tuple[Tensor | None, ...],
    has_batch_statistics: bool,
    has_input_gradient: bool,
    eps: float,
    gain: float,
) -> tuple[Tensor, list[Tensor | None]]:
    """Take all gradients on one process: :func:`reduce`, then :func:`input_gradient`.

    Args:
        dy (Tensor): As in :func:`reduce`.
        x (Tensor): As in :func:`reduce`.
        m (Tensor | None): As in :func:`reduce`.
        mean (Tensor): As in :func:`reduce`.
        var (Tensor): As in :func:`reduce`.
        parameters (tuple[Tensor | None, ...]): As in :func:`reduce`.
        has_batch_statistics (bool): Whether ``mean`` and ``var`` are those of x.
        has_input_gradient (bool): Without it dx has no values.
        eps (float): Added to ``var``.
        gain (float): As in :func:`reduce`.

    Returns:
        tuple[Tensor, list[Tensor | None]]: dx, and the gradients of ``parameters`` in their order.
    """
    m, sums, d_statistics, *gradients = reduce(dy, x, m, mean, var, parameters, eps, gain)
    share = None
    if has_batch_statistics:
        share = d_statistics.new_full((), x.shape[1] / x.numel())
    dx, d_center_weight = input_gradient(
        *(dy, x, m, mean, var, parameters, sums, d_statistics if has_batch_statistics else None),
        *(share, eps, gain),
    )
    gradients.insert(2, d_center_weight)
    return dx if has_input_gradient else x.new_empty(0), gradients


def update(
    buffers: tuple[Tensor, ...],
    summary: Tensor,
    momentum: float | None,
    threshold: float | None,
    warmup: int,
    patience: int,
    z: float | None,
    weight: float,
) -> None:
    """Let the gate decide, and move what a layer keeps, in place; 1 launch.

    Nothing changes where the summary counts no values. A closed gate leaves the running statistics
    as they are to the bit.

    Args:
        buffers (tuple[Tensor, ...]): running_mean, running_var, (C,) in any floating-point type;
            num_batches_tracked (int64), condensation (float32), num_batches_condensed,
            num_batches_readmitted, consecutive_condensed (int64), condensation_mean,
            condensation_var (float32), num_batches_scored (int64), 0-dim.
        summary (Tensor): As :func:`moments` returns it, or that of several processes.
        momentum (float | None): How far the statistics move; None for the mean of all batches.
        threshold (float | None): Score over which a batch is condensed; None for no score.
        warmup (int): Batches tracked before the score is looked at.
        patience (int): Closed gates in a row after which one batch is let through.
        z (float | None): Deviations over the mean score that the threshold is added to; None for
            the threshold alone.
        weight (float): Of a score in its moments, at least.
    """
    C = buffers[0].shape[0]
    with torch.cuda.device_of(summary):
        _update_kernel[(1,)](
            *buffers,
            summary,
            momentum=0.0 if momentum is None else momentum,
            threshold=0.0 if threshold is None else threshold,
            z=0.0 if z is None else z,
            weight=weight,
            C=C,
            num_warmup=warmup,
            patience=patience,
            HAS_MOMENTUM=momentum is not None,
            HAS_THRESHOLD=threshold is not None,
            FOLLOWS=threshold is not None and z is not None,
            CHANNELS=min(_power(C), 1024),
        )
