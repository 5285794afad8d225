"""The settings that the demo trains with: a small network, so that a laptop is done in minutes."""

SHOP_SETTINGS = """\
# The sample shop's settings: a small network for two CPU cores. Not the paper's sizes; leave them out for those.

[features]
encoder = "sketch"      # needs no weights; for demos and tests, not for research

[model]
hidden_size = 64
inner_size = 64
d_state = 16
head_dim = 32
n_groups = 4
max_len = 10
item_bias = false       # the paper's "without ID": what is learned carries over to items never seen
dropout = 0.1
embedding_dropout = 0.1
time_dropout = 0.0

[pretrain]
epochs = 3
lr = 3e-3
weight_decay = 1e-4
batch_size = 128
accumulation = 1

[finetune]
epochs = 30
lr = 2e-3
weight_decay = 1e-4
batch_size = 128
accumulation = 1
patience = 5
metric = "NDCG@10"
"""
"""Text of the demo workspace's mmm4rec.toml."""
