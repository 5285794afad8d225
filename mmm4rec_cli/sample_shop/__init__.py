"""The built-in data set of `demo`: a shop with four domains, drawn from a seed."""

from mmm4rec_cli.sample_shop.shop import Shop, ShopDomain, write_shop

__all__ = ["Shop", "ShopDomain", "write_shop"]
