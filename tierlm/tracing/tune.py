"""Searches a policy's parameters on one part of a trace and tests them on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tierlm.errors import UsageError
from tierlm.tracing.replay import open_policy, replay
from tierlm.tracing.trace import Trace

TRAIN = 0.5  # of the tokens
SEED = 0


@dataclass(frozen=True)
class Tuned:
    """Hit rates: ``train``, the best on the first ``split`` tokens; ``test`` and ``untuned``, on the rest from empty
    slots, with the best and the default parameters."""

    policy: str
    parameters: Mapping[str, float]
    split: int
    train: float
    test: float
    untuned: float


def tune(trace: Trace, name: str, slots: int, trials: int) -> Tuned:
    """Search the ``tunable`` parameters of policy ``name`` with Optuna's TPE sampler, seeded. Raises UsageError if
    Optuna is not installed or the policy has no parameters."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError("--tune needs optuna: pip install tierlm[tune]") from error
    if trials < 1 or len(trace) < 2:
        raise UsageError(f"--tune: expected at least one trial and two tokens, found {trials} and {len(trace)}")
    policy = type(open_policy(name, trace, slots))
    if not policy.tunable:
        raise UsageError(f"policy {name}: no parameters to search")
    split = round(len(trace) * TRAIN)
    first, rest = trace.part(0, split), trace.part(split, len(trace))

    def hit_rate(part: Trace, parameters: Mapping[str, float]) -> float:
        return replay(part, open_policy(name, part, slots, **parameters), slots).hit_rate

    def objective(trial: optuna.Trial) -> float:
        parameters: dict[str, float] = {}
        for parameter, (low, high) in policy.tunable.items():
            if isinstance(low, int) and isinstance(high, int):
                parameters[parameter] = trial.suggest_int(parameter, low, high)
            else:
                parameters[parameter] = trial.suggest_float(parameter, low, high)
        return hit_rate(first, parameters)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=SEED))
    study.optimize(objective, n_trials=trials)
    found, train = dict(study.best_params), study.best_value
    if (plain := hit_rate(first, {})) >= train:  # the defaults are also a candidate
        found, train = {}, plain
    return Tuned(name, found, split, train, hit_rate(rest, found), hit_rate(rest, {}))
