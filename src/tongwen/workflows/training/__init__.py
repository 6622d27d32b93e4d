"""The training job that `pretrain` and `sft` run."""
