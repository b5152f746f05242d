"""What a record says of its run."""

from thintune.config import from_dict


def test_what_was_not_measured_is_null(tiny, thintune, record, tmp_path):
    assert thintune("train", *tiny, "--train.max_steps", "1", "--out", tmp_path)[0] == 0
    found = record(tmp_path)
    assert found["steps"] == 1 and found["schema_version"] == 1
    for name in ("step_time_s_median", "step_time_s_iqr", "images_per_s", "explained_variance", "model_checkpoint"):
        assert found[name] is None, name
    measured = [k for k, v in found.items() if k.endswith(("_bytes", "_s", "per_step", "per_s")) and v is not None]
    assert {"peak_rss_bytes", "train_flops_per_step", "saved_activation_bytes", "checkpoint_bytes"} < set(measured)
    # a test before may have left more in this process than the run then needs
    assert all(found[name] > 0 for name in measured if "above_baseline" not in name)
    assert from_dict(found["config"]).train.max_steps == 1
    assert {"python", "torch", "timm", "thintune"} <= found["versions"].keys()
