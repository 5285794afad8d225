"""Our metrics against ranx, a well-kept library, on rankings without ties."""

import pytest
import torch

from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.evaluation.ranks import target_ranks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unsafe cast from uint64 to int64")
def test_metrics_agree_with_ranx(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes minutes, sixty users do not
    from ranx import Qrels, Run, evaluate

    generator = torch.Generator().manual_seed(0)
    users, items = 60, 120
    user = torch.randn(users, 8, generator=generator, dtype=torch.float64)
    table = torch.randn(items + 1, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(1, items + 1, (users,), generator=generator)
    ours = summary(target_ranks(user, table, target), (1, 10, 50))

    scores = user @ table.T
    qrels = Qrels({f"u{u}": {f"i{int(target[u])}": 1} for u in range(users)})
    run = Run({f"u{u}": {f"i{i}": float(scores[u, i]) for i in range(1, items + 1)} for u in range(users)})
    names = {f"Hit@{k}": f"hit_rate@{k}" for k in (1, 10, 50)} | {f"NDCG@{k}": f"ndcg@{k}" for k in (1, 10, 50)}
    theirs = evaluate(qrels, run, [*names.values(), "mrr"])
    for name, peer in {**names, "MRR": "mrr"}.items():
        assert ours[name] == pytest.approx(theirs[peer], abs=1e-12), name
