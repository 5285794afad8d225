"""The built-in data set of `demo`: a shop with four domains, drawn from a seed."""

from mmm4rec_cli.sample_shop.settings import SHOP_SETTINGS
from mmm4rec_cli.sample_shop.shop import Shop, ShopDomain, write_shop

__all__ = ["SHOP_SETTINGS", "Shop", "ShopDomain", "write_shop"]
