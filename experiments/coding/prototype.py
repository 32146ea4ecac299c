# ruff: noqa: E501, UP031
"""Reference codec for a collection of LoRA deltas (NumPy only).

delta[t, m] = a @ b  (a [I, R], b [R, O], scale folded in) is coded as  sum_i gain_i * x_i y_i^T  with integer
vectors x_i (input side) and y_i (output side).  SVD directions, equal step on both sides (reverse water-filling),
dependent (trellis-coded) quantisation, prediction from one reference task, static rANS tables.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import argparse
import json
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hydraopt_jax import formats

# trellis (8 states, even state: Q0, odd state: Q1)
# Q0 reconstructs 2k, Q1 reconstructs sign(k) * (2|k| - 1) or 0; the parity of k drives the state.
NEXT8 = np.array([[0, 1], [2, 3], [5, 4], [7, 6], [1, 0], [3, 2], [4, 5], [6, 7]])
QUANT8 = np.array([0, 1] * 4)
NEXT4 = np.array([[0, 2], [2, 0], [1, 3], [3, 1]])
QUANT4 = np.array([0, 0, 1, 1])
NEXT1 = np.array([[0, 0]])
QUANT1 = np.array([0])  # plain scalar quantiser of step 2
NEXT, QUANT = NEXT8, QUANT8

COLS = 4096  # symbols of one lane (trellis run and rANS state)
HI = 64  # alphabet of the entropy-coded high part of |k|
FREQ_BITS = 14
CLASSES_PER_OCTAVE = 3
NCLASS = 40  # classes a side
LAMBDA = 0.38  # Lagrange multiplier in units of step^2 per bit
D_STEP = 0.26  # distortion of a well-coded coefficient in units of step^2


def class_shift(c):
    """Number of raw low bits of |k| for scale class c (rms of the code about 2**(c/CPO) / 8)."""
    rms = 2.0 ** ((c % NCLASS) / CLASSES_PER_OCTAVE - 3)
    return max(0, int(np.floor(np.log2(rms))) - 2)


SHIFT = np.array([class_shift(c) for c in range(2 * NCLASS)], np.int64)


def scale_class(y, side):
    """Class of each column of y (in steps), from its rms."""
    rms = np.sqrt((y * y).mean(0)) / 2 + 1e-9
    c = np.clip(np.rint(CLASSES_PER_OCTAVE * (np.log2(rms) + 3)), 0, NCLASS - 1).astype(np.int64)
    need = np.searchsorted(
        HI << SHIFT[:NCLASS], np.abs(y).max(0) / 2 + 1
    )  # outliers: a class that can hold them
    return np.minimum(np.maximum(c, need), NCLASS - 1) + side * NCLASS


# probability tables (integers only)
def initial_freqs():
    """Discretised Gaussian of each class's scale: only the encoder's first guess, never needed by the decoder."""
    from math import erf

    F = np.zeros((2 * NCLASS, 2, HI))
    for c in range(2 * NCLASS):
        rms = 2.0 ** ((c % NCLASS) / CLASSES_PER_OCTAVE - 3)
        w = 1 << SHIFT[c]
        edges = (np.arange(HI + 1) * w - 0.5) / (rms + 0.15)
        edges[0] = 0
        cdf = np.array([erf(e / 2**0.5) for e in edges])
        F[c] = np.diff(cdf) + 1e-5
    return F


def to_integer_freqs(h):
    """[.., HI] counts to integer frequencies that sum to 2**FREQ_BITS, zero where the symbol never occurs."""
    total = 1 << FREQ_BITS
    out = np.zeros(h.shape, np.int64)
    for i in np.ndindex(h.shape[:-1]):
        n = h[i]
        if n.sum() == 0:
            continue
        f = np.where(n > 0, np.maximum(1, np.floor(n / n.sum() * (total - (n > 0).sum()))), 0).astype(
            np.int64
        )
        f[np.argmax(f)] += total - f.sum()
        out[i] = f
    return out


def code_costs(F):
    """Bits of each |k| (0..K-1) per class and quantiser, sign included."""
    K = HI << int(SHIFT.max())
    p = F + 1e-3 * (F.sum(-1, keepdims=True) + 1) / HI
    hb = -np.log2(p / p.sum(-1, keepdims=True))
    k = np.arange(K)
    hi = np.minimum(k[None] >> SHIFT[:, None], HI - 1)
    cost = np.take_along_axis(hb, np.repeat(hi[:, None], 2, 1), 2) + SHIFT[:, None, None]
    cost += k > 0
    over = (k[None] >> SHIFT[:, None]) >= HI
    cost[np.repeat(over[:, None], 2, 1)] = 1e4
    return cost.astype(np.float32)


# dependent quantisation
def branch_candidates(y, cls, bits, lam):
    """Best |k| and its cost for each branch (2 * quantiser + parity)."""
    ax = np.abs(y)
    K = bits.shape[-1]
    flat = bits.reshape(-1) * np.float32(lam)
    cost = np.empty((4, *y.shape), np.float32)
    best = np.empty((4, *y.shape), np.int16)
    top = ((HI << SHIFT) - 1).astype(np.int32)[cls]  # odd
    for q in range(2):
        base = ((cls * 2 + q) * K).astype(np.int32)
        centre = (ax + q) * np.float32(0.5)
        for par in range(2):
            k1 = (np.rint((centre - par) * np.float32(0.5)) * 2).astype(np.int32) + par
            np.clip(k1, par, top - 1 + par, out=k1)
            k2 = np.maximum(k1 - 2, par)
            r1 = 2 * k1 - q * (k1 > 0)
            r2 = 2 * k2 - q * (k2 > 0)
            c1 = (ax - r1) ** 2 + flat[base + k1]
            c2 = (ax - r2) ** 2 + flat[base + k2]
            take = c2 < c1
            cost[2 * q + par] = np.where(take, c2, c1)
            best[2 * q + par] = np.where(take, k2, k1)
    return cost, best


def viterbi(cost, best):
    """Cheapest path through the trellis; cost, best [4, N, n] -> |k| and quantiser, [N, n]."""
    S = len(NEXT)
    _, N, n = cost.shape
    pred = [[(s, p) for s in range(S) for p in range(2) if NEXT[s, p] == d] for d in range(S)]
    ps = np.array([[a[0] for a in pr] for pr in pred])
    pb = np.array([[2 * QUANT[a[0]] + a[1] for a in pr] for pr in pred])
    J = np.full((S, N), 1e9, np.float32)
    J[0] = 0
    choice = np.empty((n, S, N), bool)
    steps = np.ascontiguousarray(cost.transpose(2, 0, 1))
    for t in range(n):
        c = steps[t]
        first, second = J[ps[:, 0]] + c[pb[:, 0]], J[ps[:, 1]] + c[pb[:, 1]]
        np.less(second, first, out=choice[t])
        J = np.minimum(first, second)
        if t % 64 == 63:
            J -= J.min(0)
    s = J.argmin(0)
    lane = np.arange(N)
    branch = np.empty((n, N), np.int8)
    for t in range(n - 1, -1, -1):
        d = choice[t, s, lane].view(np.int8)
        branch[t] = pb[s, d]
        s = ps[s, d]
    branch = np.ascontiguousarray(branch.T)
    return np.take_along_axis(best, branch[None].astype(np.intp), 0)[0], branch >> 1


def reconstruct(mag, quant, neg):
    r = 2 * mag.astype(np.int32) - (quant & (mag > 0))
    return np.where(neg, -r, r)


@dataclass
class Stream:
    """Codes of the live vectors of one (task, side): lanes x COLS."""

    n: np.ndarray  # length of each vector
    cls: np.ndarray  # class of each vector
    mag: np.ndarray = None
    quant: np.ndarray = None
    neg: np.ndarray = None

    def lanes(self):
        return -(-int(self.n.sum()) // COLS)

    def per_symbol(self, v, pad):
        flat = np.full(self.lanes() * COLS, pad, v.dtype)
        flat[: int(self.n.sum())] = np.repeat(v, self.n)
        return flat.reshape(-1, COLS)

    def vectors(self):
        flat = reconstruct(self.mag, self.quant, self.neg).ravel()
        return np.split(flat[: int(self.n.sum())], np.cumsum(self.n)[:-1]) if len(self.n) else []


def quantise_streams(ys, clss, bits, lam):
    """ys: per stream a list of vectors (in steps); one Viterbi over all lanes of all streams."""
    streams, Y, C = [], [], []
    for vec, cls in zip(ys, clss, strict=False):
        st = Stream(np.array([len(v) for v in vec], np.int64), np.asarray(cls, np.int64))
        streams.append(st)
        if not len(vec):
            continue
        flat = np.zeros(st.lanes() * COLS, np.float32)
        flat[: int(st.n.sum())] = np.concatenate(vec)
        Y.append(flat.reshape(-1, COLS))
        C.append(st.per_symbol(st.cls, st.cls[-1]))
    if not Y:
        return streams
    Y, C = np.concatenate(Y), np.concatenate(C)
    cost, best = branch_candidates(Y, C, bits, lam)
    mag, quant = viterbi(cost, best)
    at = 0
    for st in streams:
        L = st.lanes() if len(st.n) else 0
        st.mag, st.quant, st.neg = mag[at : at + L], quant[at : at + L], Y[at : at + L] < 0
        at += L
    return streams


def histogram(streams):
    h = np.zeros(2 * NCLASS * 2 * HI)
    for st in streams:
        if len(st.n):
            c = st.per_symbol(st.cls, st.cls[-1])
            j = (c * 2 + st.quant) * HI + np.minimum(st.mag >> SHIFT[c], HI - 1)
            h += np.bincount(j.ravel(), minlength=h.size)
    h = h.reshape(2 * NCLASS, 2, HI)
    merged = SHIFT > 0  # with raw low bits the two quantisers look alike
    h[merged] = h[merged].sum(1, keepdims=True)
    return h


# rANS, one state a lane, one word stream
def rans_encode(sym, table, F):
    """sym, table [L, n]; F [tables, HI] integer. Returns bytes."""
    cum = np.cumsum(F, -1) - F
    f = F[table, sym].astype(np.uint64).T
    c = cum[table, sym].astype(np.uint64).T
    x = np.full(sym.shape[0], 1 << 16, np.uint64)
    words = []
    s16, sf = np.uint64(16), np.uint64(FREQ_BITS)
    limit = f << np.uint64(32 - FREQ_BITS)
    for t in range(sym.shape[1] - 1, -1, -1):
        full = x >= limit[t]
        if full.any():
            words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
            x[full] >>= s16
        q, r = np.divmod(x, f[t])
        x = (q << sf) + r + c[t]
    words = np.concatenate(words[::-1]) if words else np.zeros(0, "<u2")
    return x.astype("<u4").tobytes() + words.tobytes()


def rans_decode(buf, cls, low, F, L, n):
    """Decode |k| and the quantiser of every symbol; the state of the trellis picks the table."""
    T = F.reshape(-1, HI)
    cum = np.cumsum(T, -1) - T
    lookup = np.zeros((len(T), 1 << FREQ_BITS), np.uint8)
    for i, f in enumerate(T):
        if f.sum():
            lookup[i] = np.repeat(np.arange(HI, dtype=np.uint8), f)
    x = np.frombuffer(buf, "<u4", L).astype(np.int64)
    words = np.frombuffer(buf, "<u2", offset=4 * L).astype(np.int64)
    at = 0
    state = np.zeros(L, np.int64)
    mask = (1 << FREQ_BITS) - 1
    mag = np.empty((n, L), np.int64)
    quant = np.empty((n, L), np.int8)
    clsT = cls.T * 2
    sh = SHIFT[cls].T
    lowT = low.T
    flatF, flatC, flatL = T.ravel(), cum.ravel(), lookup.ravel()
    for t in range(n):
        q = QUANT[state]
        tab = clsT[t] + q
        slot = x & mask
        s = flatL[(tab << FREQ_BITS) + slot].astype(np.int64)
        j = tab * HI + s
        x = flatF[j] * (x >> FREQ_BITS) + slot - flatC[j]
        need = np.flatnonzero(x < (1 << 16))
        if len(need):
            x[need] = (x[need] << 16) | words[at : at + len(need)]
            at += len(need)
        k = (s << sh[t]) + lowT[t]
        mag[t] = k
        quant[t] = q
        state = NEXT[state, k & 1]
    return mag.T, quant.T


def pack_low(mag, shift):
    np.zeros(0, np.uint8)
    bits = []
    for b in range(int(shift.max(initial=0))):
        bits.append((mag[shift > b] >> b) & 1)
    return np.packbits(np.concatenate(bits).astype(np.uint8)).tobytes() if bits else b""


def unpack_low(buf, shift):
    low = np.zeros(shift.shape, np.int64)
    bits = np.unpackbits(np.frombuffer(buf, np.uint8))
    at = 0
    for b in range(int(shift.max(initial=0))):
        m = shift > b
        k = int(m.sum())
        low[m] |= bits[at : at + k].astype(np.int64) << b
        at += k
    return low


def stream_bytes(st, F):
    """Bit-exact body of one stream: low bits, signs, rANS."""
    if not len(st.n):
        return b""
    c = st.per_symbol(st.cls, st.cls[-1])
    sh = SHIFT[c]
    low = pack_low(st.mag.astype(np.int64), sh)
    signs = np.packbits(st.neg[st.mag > 0]).tobytes()
    body = rans_encode(st.mag >> sh, c * 2 + st.quant, F.reshape(-1, HI))
    return struct.pack("<II", len(signs), len(body)) + low + signs + body


def stream_from_bytes(buf, n, cls, F):
    st = Stream(n, cls)
    if not len(n):
        return st
    ns, _nb = struct.unpack_from("<II", buf)
    c = st.per_symbol(cls, cls[-1])
    sh = SHIFT[c]
    nl = (int(sh.sum()) + 7) // 8
    low = unpack_low(buf[8 : 8 + nl], sh)
    st.mag, st.quant = rans_decode(buf[8 + nl + ns :], c, low, F, *c.shape)
    st.neg = np.zeros(c.shape, bool)
    nz = st.mag > 0
    st.neg[nz] = np.unpackbits(np.frombuffer(buf, np.uint8, ns, 8 + nl))[: int(nz.sum())].astype(bool)
    return st


# model of a collection
@dataclass
class Node:
    """One (task, module). Sides: 0 input (U), 1 output (V)."""

    basis: list  # [U, V], float32, orthonormal columns
    s: (
        np.ndarray
    )  # singular values times sqrt(weight) / norm: the loss is sum over nodes of squared error in this scale
    norm: float  # delta = norm * U diag(s) V^T
    live: np.ndarray = None  # coded directions, indices into s
    coef: list = field(
        default_factory=lambda: [None, None]
    )  # prediction: (int8 [dref, d], fp16 [d], used [d]) or None
    cls: list = field(default_factory=lambda: [None, None])  # scale class of each coded vector
    hat: list = field(default_factory=lambda: [None, None])  # reconstruction in steps, [n, d]


def svd_of_product(a, b):
    qa, ra = np.linalg.qr(a)
    qb, rb = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(ra @ rb.T)
    return qa @ u, s, qb @ vt.T


def make_nodes(deltas):
    out = {}
    for key, (a, b) in deltas.items():
        u, s, v = svd_of_product(np.asarray(a, np.float64), np.asarray(b, np.float64))
        nrm = np.linalg.norm(s)
        out[key] = Node([u.astype(np.float32), v.astype(np.float32)], s / max(nrm, 1e-30), nrm)
    return out


def cross_grams(nodes, tasks, mods):
    """Squared cosines of all singular vectors of all task pairs: {(module, side): [T, R, T, R]} (padded with zeros)."""
    out = {}
    for m in mods:
        r = max(len(nodes[t, m].s) for t in tasks)
        for side in (0, 1):
            n = len(nodes[tasks[0], m].basis[side])
            X = np.zeros((n, len(tasks), r), np.float32)
            for j, t in enumerate(tasks):
                X[:, j, : len(nodes[t, m].s)] = nodes[t, m].basis[side]
            X = X.reshape(n, -1)
            out[m, side] = ((X.T @ X) ** 2).reshape(len(tasks), r, len(tasks), r)
    return out


def side_costs(n, var):
    """Lagrangian cost (step^2) and bits of coding n Gaussian coefficients of variance var (step^2)."""
    bits = 0.5 * n * np.log2(np.maximum(var / D_STEP, 1))
    return n * np.minimum(var, D_STEP) + LAMBDA * bits, bits


def plan(nodes, grams, tasks, mods, step, refs):
    """Reverse water-filling estimate: for each candidate reference (task index or None) the live directions; the
    cheapest is kept.  Returns (its index or None, estimated bytes) and sets node.live."""
    T = len(tasks)
    best = None
    S2 = (
        np.array(
            [
                [np.pad(nodes[t, m].s, (0, grams[m, 0].shape[1] - len(nodes[t, m].s))) ** 2 for t in tasks]
                for m in mods
            ]
        )
        / step**2
    )

    def own(m_i, m, side):
        n = len(nodes[tasks[0], m].basis[side])
        return n, S2[m_i] / n

    alone = [sum(side_costs(*own(i, m, sd))[0] for sd in (0, 1)) < 0.97 * S2[i] for i, m in enumerate(mods)]
    for r in refs:
        J = bits = 0.0
        live = []
        for i, m in enumerate(mods):
            cost = 0
            b = 40.0
            for sd in (0, 1):
                n, var = own(i, m, sd)
                if r is not None and alone[i][r].any():
                    rho = np.minimum(
                        np.einsum("tji->ti", grams[m, sd][:, :, r].transpose(0, 2, 1)[:, alone[i][r]]), 1.0
                    )
                    res = var * (1 - rho) + rho * np.minimum(var, D_STEP)  # the reference is noisy too
                    side = 8 * (alone[i][r].sum() + 2)
                    use = (side_costs(n, res)[0] + LAMBDA * side < side_costs(n, var)[0]) & (
                        np.arange(T) != r
                    )[:, None]
                    var = np.where(use, res, var)
                    b = b + side * use
                c, bb = side_costs(n, var)
                cost = cost + c
                b = b + bb
            keep = cost < 0.99 * S2[i]
            if r is not None:
                keep[r] = alone[i][r]
            J += np.where(keep, cost, S2[i]).sum()
            bits += (b * keep).sum()
            live.append(keep)
        if best is None or best[0] > J:
            best = J, r, bits, live
    _, r, bits, live = best
    for i, m in enumerate(mods):
        for j, t in enumerate(tasks):
            nodes[t, m].live = np.flatnonzero(live[i][j][: len(nodes[t, m].s)])
    return r, bits / 8


def predict(X, ref):
    """Coefficients (int8, fp16 scale) that predict X's columns from the reference's codes, for the columns where
    that saves more bits than it costs; and the prediction."""
    G = ref.T.astype(np.float64) @ ref
    R = np.linalg.solve(G + 1e-3 * np.eye(len(G)) * len(ref), ref.T @ X)
    scale = (np.abs(R).max(0) / 127 + 1e-7).astype(np.float16)
    q = np.clip(np.rint(R / scale.astype(np.float32)), -127, 127).astype(np.int8)
    P = ref @ (q * scale.astype(np.float32))
    save = len(X) / 2 * np.log2(((X**2).mean(0) + 0.6) / (((X - P) ** 2).mean(0) + 0.6))
    used = save > 8 * (len(G) + 2)
    if not used.any():
        return None, np.zeros_like(X)
    return (q, scale, used), P * used


def code_tasks(nodes, tasks, mods, step, bits, ref):
    """Quantise both sides of the given tasks, predicting from the (already coded) reference task if it is another one."""
    ys, cs, base = [], [], {}
    for t in tasks:
        for side in (0, 1):
            vec, cls = [], []
            for m in mods:
                nd = nodes[t, m]
                nd.coef[side] = None
                if not len(nd.live):
                    nd.hat[side] = None
                    continue
                X = nd.basis[side][:, nd.live] * (nd.s[nd.live] / step).astype(np.float32)
                P = np.zeros_like(X)
                if ref not in (None, t) and len(nodes[ref, m].live):
                    nd.coef[side], P = predict(X, nodes[ref, m].hat[side])
                base[t, m, side] = P
                Y = X - P
                nd.cls[side] = scale_class(Y, side)
                vec += list(Y.T)
                cls += list(nd.cls[side])
            ys.append(vec)
            cs.append(cls)
    got = iter(quantise_streams(ys, cs, bits, LAMBDA))
    streams = {}
    for t in tasks:
        for side in (0, 1):
            st = streams[t, side] = next(got)
            v = st.vectors()
            at = 0
            for m in mods:
                nd = nodes[t, m]
                d = len(nd.live)
                if d:
                    nd.hat[side] = np.array(v[at : at + d], np.float32).T + base[t, m, side]
                    at += d
    return streams


def code_all(nodes, tasks, mods, step, freqs, ref):
    bits = code_costs(freqs)
    streams = {}
    if ref is not None:
        streams |= code_tasks(nodes, [ref], mods, step, bits, ref)
    streams |= code_tasks(nodes, [t for t in tasks if t != ref], mods, step, bits, ref)
    return streams, histogram(streams.values())


def gains(nd):
    """Least-squares gain of each rank-one term given both reconstructions, relative to norm (all terms jointly)."""
    x, y = (h.astype(np.float64) for h in nd.hat)
    s = nd.s
    A = (x.T @ x) * (y.T @ y)
    r = np.einsum("kr,kr,k->r", nd.basis[0].T.astype(np.float64) @ x, nd.basis[1].T.astype(np.float64) @ y, s)
    return np.linalg.lstsq(A, r, rcond=None)[0], A, r


def errors(nodes):
    e = {}
    for k, nd in nodes.items():
        e[k] = float((nd.s**2).sum())
        if len(nd.live):
            g, A, r = gains(nd)
            e[k] += float(-2 * g @ r + g @ A @ g)
    return e


# bitstream
def side_info(nodes, t, mods, side_order=(0, 1)):
    """Live counts, classes, gains, prediction coefficients of one task."""
    live = bytearray()
    cls = bytearray()
    gain = bytearray()
    coef = bytearray()
    solved = {m: gains(nodes[t, m])[0] * nodes[t, m].norm for m in mods if len(nodes[t, m].live)}
    unit = np.float32(max([abs(g).max() for g in solved.values()], default=1.0))
    gain += unit.tobytes()
    for m in mods:
        nd = nodes[t, m]
        live += struct.pack("<B", len(nd.live))
        if not len(nd.live):
            continue
        gain += (solved[m] / unit).astype(np.float16).tobytes()
        for side in side_order:
            cls += bytes(nd.cls[side].astype(np.uint8))
            c = nd.coef[side]
            used = np.zeros(len(nd.live), bool) if c is None else c[2]
            coef += np.packbits(used, bitorder="little").tobytes()
            if c is not None:
                q, sc, good = c
                coef += sc[good].tobytes() + np.ascontiguousarray(q[:, good].T).tobytes()
    return [bytes(live), bytes(cls), bytes(gain), bytes(coef)]


def tables_bytes(F):
    """Sparse integer tables: LEB-free, 2 bytes a nonzero frequency, trailing zeros cut, then zlib."""
    out = bytearray()
    for i in range(len(F)):
        for q in range(1 if SHIFT[i] else 2):
            f = F[i, q]
            n = int(np.max(np.flatnonzero(f), initial=-1)) + 1
            out += bytes([n]) + f[:n].astype("<u2").tobytes()
    return zlib.compress(bytes(out), 9)


def tables_from_bytes(buf):
    raw = zlib.decompress(buf)
    at = 0
    F = np.zeros((2 * NCLASS, 2, HI), np.int64)
    for i in range(len(F)):
        for q in range(1 if SHIFT[i] else 2):
            n = raw[at]
            at += 1
            F[i, q, :n] = np.frombuffer(raw, "<u2", n, at)
            at += 2 * n
        if SHIFT[i]:
            F[i, 1] = F[i, 0]
    return F


def frame(parts):
    return struct.pack("<I", len(parts)) + b"".join(struct.pack("<I", len(p)) + p for p in parts)


def unframe(buf):
    (n,) = struct.unpack_from("<I", buf)
    at = 4
    out = []
    for _ in range(n):
        (k,) = struct.unpack_from("<I", buf, at)
        out.append(buf[at + 4 : at + 4 + k])
        at += 4 + k
    return out


def serialise(nodes, tasks, mods, streams, hist, ref):
    """{'tables': bytes, task: bytes, ...}: the reference task's blob and the tables are the shared part."""
    F = to_integer_freqs(hist)
    blobs = {"tables": tables_bytes(F)}
    for t in tasks:
        info = side_info(nodes, t, mods)
        info = [zlib.compress(b"".join(struct.pack("<I", len(p)) + p for p in info), 9)]
        blobs[t] = frame([*info, stream_bytes(streams[t, 0], F), stream_bytes(streams[t, 1], F)])
    return blobs


def decode_task(blobs, t, ref, mods, dims, shared=None):
    """Factors of one task: {module: (x [I, d], y [d, O])}, reading the tables, the reference's blob and its own."""
    F = tables_from_bytes(blobs["tables"])
    info, su, sv = unframe(blobs[t])
    raw = zlib.decompress(info)
    parts = []
    at = 0
    for _ in range(4):
        (k,) = struct.unpack_from("<I", raw, at)
        parts.append(raw[at + 4 : at + 4 + k])
        at += 4 + k
    live = np.frombuffer(parts[0], np.uint8)
    d_of = {m: int(d) for m, d in zip(mods, live, strict=False)}
    g = np.frombuffer(parts[2], np.float16, offset=4).astype(np.float64) * np.frombuffer(
        parts[2], np.float32, 1
    )
    cls = np.frombuffer(parts[1], np.uint8).astype(np.int64)
    n, c, coefs = ([], []), ([], []), {}
    at = ca = 0
    coef = parts[3]
    for m in mods:
        d = d_of[m]
        if not d:
            continue
        for side in (0, 1):
            n[side].extend([dims[m][side]] * d)
            c[side].extend(cls[at : at + d])
            at += d
            good = np.unpackbits(np.frombuffer(coef, np.uint8, -(-d // 8), ca), bitorder="little")[:d].astype(
                bool
            )
            ca += -(-d // 8)
            k = int(good.sum())
            if k:
                dr = shared[m][side].shape[1]
                R = np.zeros((dr, d), np.float32)
                sc = np.frombuffer(coef, np.float16, k, ca).astype(np.float32)
                ca += 2 * k
                R[:, good] = np.frombuffer(coef, np.int8, k * dr, ca).reshape(k, dr).T * sc
                ca += k * dr
                coefs[m, side] = R
    hats = []
    for side, body in ((0, su), (1, sv)):
        st = stream_from_bytes(body, np.array(n[side], np.int64), np.array(c[side], np.int64), F)
        hats.append(st.vectors())
    out, at, _ga = {}, 0, 0
    for m in mods:
        d = d_of[m]
        if not d:
            out[m] = (
                np.zeros((dims[m][0], 0), np.float32),
                np.zeros((dims[m][1], 0), np.float32),
                np.zeros(0),
            )
            continue
        hat = []
        for side in (0, 1):
            h = np.array(hats[side][at : at + d], np.float32).T
            if (m, side) in coefs:
                h = h + shared[m][side] @ coefs[m, side]
            hat.append(h)
        out[m] = (hat[0], hat[1], g[at : at + d].astype(np.float64))
        at += d
    return out


PRIOR = initial_freqs()


def posterior(hist):
    """Tables the encoder decides with: counts over a weak prior, so that a rare class keeps sensible costs."""
    return hist + 8 * PRIOR / PRIOR.sum(-1, keepdims=True)


def train_tables(nodes, tasks, mods, step, ref, rounds=6, share_of_modules=0.2):
    """Alternate quantisation and counting on a few modules: rate-distortion decisions and tables shape each other."""
    few = [
        mods[i]
        for i in np.random.default_rng(0).permutation(len(mods))[
            : max(1, round(share_of_modules * len(mods)))
        ]
    ]
    freqs = PRIOR
    for _ in range(rounds):
        freqs = posterior(code_all(nodes, tasks, few, step, freqs, ref)[1])
    return freqs


def encode(deltas, tasks, mods, budget_bytes, overhead=0, share=True, nodes=None, iterations=6, log=None):
    """Meet a byte budget by a secant search on the one multiplier, the step (LAMBDA is in units of step^2)."""
    nodes = nodes or make_nodes(deltas)
    grams = cross_grams(nodes, tasks, mods)
    refs = [None, *list(range(len(tasks)))] if share and len(tasks) > 1 else [None]
    lo, hi = np.log(1e-6), np.log(0.5)
    for _ in range(12):  # start: bisection on the Gaussian estimate
        mid = (lo + hi) / 2
        size = 1.06 * plan(nodes, grams, tasks, mods, np.exp(mid), refs)[1] + overhead
        lo, hi = (mid, hi) if size > budget_bytes else (lo, mid)
    x = hi
    best = None
    tried = []
    refs = [plan(nodes, grams, tasks, mods, np.exp(x), refs)[0]]
    ref = None if refs[0] is None else tasks[refs[0]]
    freqs = train_tables(nodes, tasks, mods, np.exp(x), ref)
    for it in range(iterations):
        step = np.exp(x)
        guess = plan(nodes, grams, tasks, mods, step, refs)[1]
        streams, hist = code_all(nodes, tasks, mods, step, freqs, ref)
        freqs = posterior(hist)
        blobs = serialise(nodes, tasks, mods, streams, hist, ref)
        size = sum(map(len, blobs.values())) + overhead
        if log:
            log(
                it,
                "step %.3e ref %s live %d guess %d size %d of %d"
                % (step, ref, sum(len(n.live) for n in nodes.values()), guess + overhead, size, budget_bytes),
            )
        if size <= budget_bytes and (best is None or size > best[0]):
            best = size, blobs, ref, step
        if 0.997 * budget_bytes < size <= budget_bytes:
            break
        tried.append((x, np.log(size)))
        slope = -0.8
        if len(tried) > 1:
            (x0, y0), (x1, y1) = tried[-2:]
            slope = np.clip((y1 - y0) / (x1 - x0), -1.2, -0.5) if x1 != x0 else slope
        x += (np.log(0.9985 * budget_bytes) - np.log(size)) / slope
    if best is None:
        raise ValueError("budget not met")
    return best[1], nodes, best[2], best[3]


def true_error(nd, x, y, g):
    """Relative squared error of sum_i g_i x_i y_i^T against the node (R x R products only)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    g = g / nd.norm
    r = np.einsum(
        "kr,kr,k->r", nd.basis[0].T.astype(np.float64) @ x, nd.basis[1].T.astype(np.float64) @ y, nd.s
    )
    return float((nd.s**2).sum() - 2 * g @ r + g @ ((x.T @ x) * (y.T @ y)) @ g)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "adapters", nargs="+", help="PEFT folders of one base model, all with the same modules"
    )
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.125, 0.0625, 0.03])
    parser.add_argument("--alone", action="store_true", help="predict nothing from another task")
    parser.add_argument("--metadata", type=int, default=8000, help="bytes set aside for names and shapes")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    adapters = [formats.read_adapter(x) for x in options.adapters]
    tasks, mods = [x.task for x in adapters], sorted(adapters[0].a)
    deltas = {
        (x.task, m): (x.a[m].astype(np.float64), x.b[m].astype(np.float64)) for x in adapters for m in mods
    }
    dims = {m: (adapters[0].a[m].shape[0], adapters[0].b[m].shape[1]) for m in mods}
    fp16 = 2 * sum(a.size + b.size for a, b in deltas.values())
    nodes, rows = make_nodes(deltas), []
    for fraction in options.fractions:
        start = time.time()
        blobs, nodes, ref, _ = encode(
            deltas,
            tasks,
            mods,
            int(fraction * fp16),
            overhead=options.metadata,
            share=not options.alone,
            nodes=nodes,
        )
        encoded = time.time() - start
        shared = decode_task(blobs, ref, ref, mods, dims) if ref else None
        decoded = {t: shared if t == ref else decode_task(blobs, t, ref, mods, dims, shared) for t in tasks}
        errors = [true_error(nodes[t, m], *decoded[t][m]) for t in tasks for m in mods]
        size = sum(len(x) for x in blobs.values()) + options.metadata
        rows.append(
            {
                "budget": fraction,
                "bytes": size / fp16,
                "error": float(np.mean(errors)),
                "reference": ref,
                "encode_s": round(encoded, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        result = {"tasks": tasks, "alone": options.alone, "metadata": options.metadata, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
