from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.training.policies import settings
from skipllm_core.skip.profile import SkipProfile


def test_every_policy_is_compared_at_every_ratio_and_layers_can_be_given() -> None:
    profile = SkipProfile.load(MODEL_DIR / "skip.yaml")
    found = dict(settings(profile, [0.1, 0.25], ["3,4,5"]))
    assert len(found) == 6 * 2 + 1
    assert found["ffn_skip 25%"].policy == "ffn_skip"
    assert found["early_exit 10%"].budget_tokens is not None
    assert found["layers 3,4,5"].layers == (3, 4, 5)
    assert {skip.policy for skip in found.values()} == {
        "ffn_skip", "neurons", "static", "random", "layer_drop", "early_exit",
    }  # fmt: skip
