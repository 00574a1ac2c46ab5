"""Check a slide's plan against the served model's contract; convert its coordinates to the model's."""

from __future__ import annotations

from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.errors import CoordinateError
from gigapath_contract.schema import Contract

from ..arrays import Int64
from ..errors import ContractMismatch
from ..slides.tiling import TilePlan


def check_plan(plan: TilePlan, contract: Contract) -> None:
    """Refuse a plan whose tiles are not what the model was made for.

    Raises:
        ContractMismatch: another tile size, crop or scale, another order, or too many tiles.
    """
    tile = contract.tile
    wanted = {"tile px": tile.size_px, "crop px": tile.crop_px, "mpp": tile.mpp}
    planned = {"tile px": plan.tile_px, "crop px": plan.crop_px, "mpp": plan.mpp_requested}
    wrong = [
        f"{name} {planned[name]:g} instead of {wanted[name]:g}"
        for name in wanted
        if planned[name] != wanted[name]
    ]
    if wrong:
        raise ContractMismatch(
            f"{plan.path}: planned with {', '.join(wrong)}: plan as the served model's contract says"
        )
    if contract.variant.order != "row-major":
        raise ContractMismatch(
            f"the model wants tiles in {contract.variant.order} order, this client sends row-major"
        )
    if len(plan) > contract.limits.max_tiles:
        raise ContractMismatch(
            f"{plan.path}: {len(plan)} tiles are more than the {contract.limits.max_tiles} the model takes: "
            "raise --min-tissue or give a --mask"
        )


def grid_coordinates(contract: Contract, coords: Int64, scale: LevelZeroScale) -> Int64:
    """`coords` (level-0 pixels [N, 2]) as COORDS [N, 2] by the contract's rule.

    Raises:
        ContractMismatch: the rule is unknown or lacks its scale, or a tile lies outside the position grid.
    """
    try:
        return contract.grid_coordinates(coords, scale)
    except CoordinateError as error:
        raise ContractMismatch(str(error)) from error
