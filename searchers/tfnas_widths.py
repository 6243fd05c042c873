"""TF-NAS's elasticity scaling: widths that bring the derived network to its budget, and what a network costs meanwhile.

Hu et al., ECCV 2020, section 3.4, and the released code (``tools/utils.py`` of AberHu/TF-NAS). Several budgets may hold
at once: a network is over where any is exceeded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise as pairs

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from latbench.errors import UsageError
from latbench.oracle.factors import Chain, Factor, FactorOracle
from latbench.spaces.base import Arch
from latbench.spaces.mbconv import NONE, OPERATIONS, WIDEST, TFNASSpace
from searchers.base import TOLERANCE, Problem
from searchers.chains import Floats, Ints, Paths
from searchers.selection import select

MARGIN = 1e-6  # of a budget: above the integer programme's tolerance
Operations = tuple[int, ...]  # per site one of OPERATIONS, or NONE: what is derived


@dataclass(frozen=True, eq=False)
class Budgets:
    """What every block costs at every whole width, and the limits (C of them).

    Between the widths that the space has, costs are linear, as in the authors' tables: the expectation over the two
    neighbouring options. A width counts an operation's own mid channels.
    """

    space: TFNASSpace
    oracles: tuple[FactorOracle, ...]
    base: Floats  # (C,) of stem and head
    limits: Floats  # (C,)
    options: tuple[tuple[Ints, ...], ...]  # [site][operation]: widths that the space has, ascending
    curves: tuple[tuple[Floats, ...], ...]  # [site][operation]: (C, widths), from the narrowest to the widest

    @classmethod
    def of(cls, problem: Problem) -> Budgets:
        """Raises UsageError where the space is not TF-NAS's or an oracle is no sum over its blocks, MissingEntryError
        where a table lacks one."""
        space = problem.space
        if not isinstance(space, TFNASSpace):
            raise UsageError(f"tfnas searches the space tfnas, not {space.name}: profile that one, or search with aows")
        oracles = problem.sums("tfnas")
        chains = [oracle.chain() for oracle in oracles]
        blocks = [_block_costs(chain) for chain in chains]
        options, curves = [], []
        for i, site in enumerate(space.block_sites):
            chosen = np.array(space.decisions[site.scope[1]].options, np.int64)
            mids = [np.unique(chosen * o.max_expansion // WIDEST, return_index=True) for o in OPERATIONS]
            options.append(tuple(widths for widths, _ in mids))
            curves.append(
                tuple(
                    np.stack(
                        [np.interp(np.arange(widths[0], widths[-1] + 1), widths, cost[i][o, first]) for cost in blocks]
                    )
                    for o, (widths, first) in enumerate(mids)
                )
            )
        limits = np.array(problem.budgets())
        base = np.array([chain.constant for chain in chains])
        return cls(space, oracles, base, limits, tuple(options), tuple(curves))

    @cached_property
    def narrowest(self) -> Ints:
        """(L, O)."""
        return np.array([[widths[0] for widths in row] for row in self.options])

    @cached_property
    def widest(self) -> Ints:
        """(L, O)."""
        return np.array([[widths[-1] for widths in row] for row in self.options])

    @cached_property
    def stages(self) -> Ints:
        """(L,) the stage of each site."""
        return np.array([site.stage for site in self.space.block_sites])

    def table(self, widths: Ints) -> Floats:
        """(L, O) widths -> (C, L, O) costs."""
        rows = [
            [curve[:, m - low] for curve, m, low in zip(*row, strict=True)]
            for row in zip(self.curves, widths.tolist(), self.narrowest.tolist(), strict=True)
        ]
        costs: Floats = np.array(rows, np.float64).transpose(2, 0, 1)
        return costs

    def cost(self, ops: Operations, widths: Ints) -> Floats:
        """(C,) of a network with these operations, each at its width of (L, O)."""
        total: Floats = self.base.copy()
        for i, o in enumerate(ops):
            if o != NONE:
                total += self.curves[i][o][:, widths[i, o] - self.narrowest[i, o]]
        return total

    def within(self, cost: Floats) -> bool:
        """Whether (C,) costs keep every limit, up to ``TOLERANCE``."""
        return bool((cost <= self.limits * (1 + TOLERANCE)).all())

    def settled(self, widths: Ints) -> tuple[FactorOracle, ...]:
        """The oracles where each operation has its width of (L, O): they depend on operations only."""
        found = []
        for oracle, base, table in zip(self.oracles, self.base, self.table(widths), strict=True):
            factors = [Factor("stem and head", (), np.array(base))]
            for site, row in zip(self.space.block_sites, table, strict=True):
                absent = [0.0] if site.position else []
                factors.append(Factor(site.name, site.scope[:1], np.array([*row, *absent])))
            found.append(FactorOracle(self.space, tuple(factors), oracle.provenance, oracle.unit))
        return tuple(found)

    def arch(self, ops: Operations, widths: Ints) -> Arch:
        """The architecture of operations at widths that the space has. Raises UsageError at others."""
        stages: list[list[tuple[int, int]]] = [[] for _ in range(int(self.stages[-1]) + 1)]
        for i, (stage, o) in enumerate(zip(self.stages.tolist(), ops, strict=True)):
            if o != NONE:
                stages[stage].append((o, int(widths[i, o])))
        return self.space.encode(stages)


def _block_costs(chain: Chain) -> list[Floats]:
    """Per site (O, widths). Decisions of the space are (operation, width) by site."""
    costs = [
        operation[:, None] + width + both
        for operation, width, both in zip(chain.unary[::2], chain.unary[1::2], chain.pairwise[::2], strict=True)
    ]
    if any(pair.any() for pair in chain.pairwise[1::2]) or any(cost[NONE:].any() for cost in costs):
        raise UsageError("tfnas needs sums over blocks where an absent one costs nothing: search with the table itself")
    return [cost[:NONE] for cost in costs]


# ---- which network is meant -----------------------------------------------------------------------------------------


def derive(budgets: Budgets, log_alphas: Floats, log_betas: Floats) -> Operations:
    """The likeliest operations and depths among those whose range of widths holds the target.

    (L, O) and (L,) log-probabilities, a stage's depths in its blocks' places. Mostly the paper's answer: each site's
    likeliest operation, each stage's likeliest depth. Where these are over the budgets at every width, or leave all of
    them unused at every width, the sum of log-probabilities is maximised exactly among the others. A target above all
    networks needs no use. Raises InfeasibleTargetError where no network keeps the budgets at its narrowest.
    """
    ops = [int(o) for o in log_alphas.argmax(axis=1)]
    for stage in range(int(budgets.stages[-1]) + 1):
        sites = np.flatnonzero(budgets.stages == stage)
        for site in sites[int(log_betas[sites].argmax()) + 1 :]:
            ops[site] = NONE
    likeliest = tuple(ops)
    fits = budgets.within(budgets.cost(likeliest, budgets.narrowest))
    if fits and (budgets.cost(likeliest, budgets.widest) >= budgets.limits).any():
        return likeliest
    gains = log_alphas - log_alphas.max(axis=1, keepdims=True)
    found = [_likeliest(budgets, gains, log_betas, c) for c in range(len(budgets.limits))]
    if any(score > -np.inf for score, _ in found):
        return max(found)[1]
    return likeliest if fits else _kept(budgets, gains, log_betas)


def _likeliest(budgets: Budgets, gains: Floats, log_betas: Floats, used: int) -> tuple[float, Operations]:
    """The best sum of gains and the log-probability of depths, by an integer programme, and its operations; -inf where
    none keeps the budgets at its narrowest and exceeds budget `used` at its widest.

    Binary variables: 18 x 8 operations, 18 depths. A block has one operation if its stage is deep enough, else none.
    """
    n_sites, n_ops = gains.shape
    blocks = np.kron(np.eye(n_sites), np.ones(n_ops))  # (L, L * O) operations of each block
    same = budgets.stages[:, None] == budgets.stages
    deeper = np.triu(same)  # (L, L): depths with which a block is there
    each_stage = np.arange(budgets.stages[-1] + 1)[:, None] == budgets.stages
    room = budgets.limits - budgets.base
    scale_by = np.abs(budgets.limits)[:, None]
    low, high = (
        budgets.table(widths).reshape(len(room), -1) / scale_by for widths in (budgets.narrowest, budgets.widest)
    )
    nothing = np.zeros((len(room), n_sites))
    share = room / scale_by[:, 0]
    done = milp(
        -np.concatenate([gains.ravel(), log_betas]),
        integrality=np.ones(gains.size + n_sites, np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.hstack([blocks, -deeper.astype(float)]), 0, 0),
            LinearConstraint(np.hstack([np.zeros((len(each_stage), gains.size)), each_stage]), 1, 1),
            LinearConstraint(np.hstack([low, nothing]), -np.inf, share - MARGIN),
            LinearConstraint(np.hstack([high, nothing])[used], share[used] + MARGIN, np.inf),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if done.x is None:
        return -np.inf, ()
    chosen = done.x[: gains.size].reshape(gains.shape)  # (L, O)
    return -done.fun, tuple(int(row.argmax()) if row.max() > 0.5 else NONE for row in chosen)


def _kept(budgets: Budgets, gains: Floats, log_betas: Floats) -> Operations:
    """The same where hardly a network keeps the budgets: exact to the last bit, and nothing must be used up."""
    first = np.append(True, budgets.stages[1:] != budgets.stages[:-1])
    deeper = log_betas - np.where(first, 0.0, np.roll(log_betas, 1))  # up to block d they sum up to log beta[d]
    sites = budgets.space.block_sites
    scores = [
        np.append(row + depth, [0.0] if site.position else [])
        for site, row, depth in zip(sites, gains, deeper, strict=True)
    ]
    chains = [_chain(budgets, c) for c in range(len(budgets.limits))]
    return tuple(int(o) for o in select(Paths.of(scores, chains), budgets.limits.tolist()).path)


def _chain(budgets: Budgets, c: int) -> Chain:
    """A cost at the narrowest; a block behind an absent one of its stage is beyond any budget."""
    costs = budgets.table(budgets.narrowest)[c]  # (L, O)
    sites = budgets.space.block_sites
    unary = tuple(np.append(row, [0.0] if s.position else []) for s, row in zip(sites, costs, strict=True))
    pairwise = [np.zeros((len(a), len(b))) for a, b in pairs(unary)]
    for site, pair in zip(sites[1:], pairwise, strict=True):
        if site.position > 1:
            pair[NONE, :NONE] = 10 * (abs(budgets.limits[c]) + costs.max(axis=1).sum())
    return Chain(float(budgets.base[c]), unary, tuple(pairwise))


# ---- elasticity scaling ---------------------------------------------------------------------------------------------


def fit(
    budgets: Budgets, ops: Operations, widths: Ints, first_stage: int, sign: int, *, faithful: bool = False
) -> Ints:
    """(L, O) widths after steps of `sign` in the stages from `first_stage` on, all kept blocks at once.

    A block's step is its width in multiples of the narrowest block's. Shrinking ends below the limits, widening with
    the last widths within them; either where no block can move. `faithful`: widening stops short of the last step
    where that brings every block to its end, as in the released code.
    """
    sites = [i for i, o in enumerate(ops) if o != NONE and budgets.stages[i] >= first_stage]
    place = (np.array(sites), np.array([ops[i] for i in sites]))
    low, high = budgets.narrowest[place], budgets.widest[place]
    steps = sign * np.rint(widths[place] / widths[place].min()).astype(np.int64)  # half to even, as Python's round
    before, now = widths, widths
    moving, inside = np.ones(len(sites), bool), _goes_on(budgets, ops, now, sign)
    while moving.any() and inside:
        wanted = now[place] + steps
        before, now = now, now.copy()
        now[place] = wanted.clip(low, high)
        moving = (low < wanted) & (wanted < high)
        inside = _goes_on(budgets, ops, now, sign)
    if sign < 0 or (inside and not faithful):
        return now
    return before


def _goes_on(budgets: Budgets, ops: Operations, widths: Ints, sign: int) -> bool:
    cost = budgets.cost(ops, widths)
    return budgets.within(cost) if sign > 0 else bool((cost >= budgets.limits).any())


def scale(budgets: Budgets, ops: Operations, widths: Ints, *, faithful: bool = False) -> list[Ints]:
    """(L, O) widths after each call of ``fit``: shrunk where over, then widened in ever fewer, later stages.

    The last one is the answer; empty where the network is on its limit. Widths of other operations stay.
    """
    cost = budgets.cost(ops, widths)
    if (cost > budgets.limits).any():
        first = -1
    elif (cost < budgets.limits).all():
        first = 1
    else:
        return []
    found = [fit(budgets, ops, widths, 0, first, faithful=faithful)]
    for stage in range(1, int(budgets.stages[-1]) + 1):
        found.append(fit(budgets, ops, found[-1], stage, 1, faithful=faithful))
    return found


def settle(budgets: Budgets, ops: Operations, widths: Ints) -> Ints:
    """(L, O) widths at which the network is one of the space, within the limits, and no block could be one option
    wider.

    Widths between two options become the smaller one; then blocks are widened by one option each, from the last to
    the first, as long as one fits. Where a wider block may be cheaper (measured tables), all are narrowed first.
    """
    now: Ints = widths.copy()
    kept = [(i, o) for i, o in enumerate(ops) if o != NONE]
    at = {(i, o): int(np.searchsorted(budgets.options[i][o], now[i, o], side="right")) - 1 for i, o in kept}

    def put(block: tuple[int, int], index: int) -> None:
        at[block] = index
        now[block] = budgets.options[block[0]][block[1]][index]

    for block in kept:
        put(block, at[block])
    while not budgets.within(budgets.cost(ops, now)) and any(at.values()):
        for block in kept:
            put(block, max(0, at[block] - 1))
    widened = True
    while widened:
        widened = False
        for block in reversed(kept):
            if at[block] + 1 < len(budgets.options[block[0]][block[1]]):
                put(block, at[block] + 1)
                if budgets.within(budgets.cost(ops, now)):
                    widened = True
                else:
                    put(block, at[block] - 1)
    return now


def spare_steps(budgets: Budgets, ops: Operations, widths: Ints) -> float:
    """How much of the cheapest next channel step the budgets leave: below 1 where none fits; 0 at the widest.

    A step is one option of one kept block.
    """
    cost, found = budgets.cost(ops, widths), 0.0
    for i, o in enumerate(ops):
        if o == NONE or widths[i, o] == budgets.widest[i, o]:
            continue
        options = budgets.options[i][o]
        wider = widths.copy()
        wider[i, o] = options[int(np.searchsorted(options, widths[i, o], side="right"))]
        step = budgets.cost(ops, wider) - cost
        with np.errstate(divide="ignore"):
            found = max(found, float(np.where(step > 0, (budgets.limits - cost) / step, np.inf).min()))
    return found
