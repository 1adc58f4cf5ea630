"""Recipes: what is quantized how in the three matmuls of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from narrowgauge.quant.scheme import Scheme


@dataclass(frozen=True)
class Product:
    """Schemes of the two operands of one matmul ``left @ right.T``.

    Both operands stand with the contraction axis last, so ``"row"`` is one scale for all that one entry of
    the result sums over: the scales can be applied after the product.
    """

    left: Scheme
    right: Scheme


@dataclass(frozen=True)
class Recipe:
    """The three matmuls of a linear layer with tokens x, weight W and gradient g of the output.

    Attributes:
        name: The name users choose it by.
        output: ``x @ W.T``
        grad_input: ``g @ W``
        grad_weight: ``g.T @ x``
    """

    name: str
    output: Product
    grad_input: Product
    grad_weight: Product


def _rowwise(name: str, format: str) -> Recipe:
    product = Product(Scheme(format, "row"), Scheme(format, "row"))
    return Recipe(name, output=product, grad_input=product, grad_weight=product)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_rowwise("int8-row", "int8"), _rowwise("fp8-row", "e4m3"))
}
