"""The experts of a mixture-of-experts model and how a token chooses among them, as one frozen value."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class ExpertConfig(BaseModel):
    """One layer's experts; all such layers are alike.

    count: experts; per_token: how many a token goes to; width: of one expert's hidden layer; shared_width: of the one
    that every token goes to, 0 = there is none. dense_layers: layers with an ordinary feed-forward layer instead.
    score: how the router's numbers become weights; normalise: the chosen ones then add up to 1; scaling: a factor for
    them; groups, kept_groups: experts are chosen from so many of the equal groups; bias: the choice (not the weight)
    has a bias per expert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    count: int = Field(gt=0)
    per_token: int = Field(gt=0)
    width: int = Field(gt=0)
    dense_layers: tuple[int, ...] = ()
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scaling: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    groups: int = Field(default=1, gt=0)
    kept_groups: int = Field(default=1, gt=0)
    shared_width: int = Field(default=0, ge=0)
    bias: bool = False

    @field_validator("per_token")
    @classmethod
    def _at_most_all(cls, value: int, info: ValidationInfo) -> int:
        count = info.data.get("count")
        if count is not None and value > count:
            raise ValueError(f"at most the {count} experts")
        return value

    @field_validator("groups")
    @classmethod
    def _equal_groups(cls, value: int, info: ValidationInfo) -> int:
        count = info.data.get("count")
        if count is not None and value > 1 and (count % value or count // value < 2):
            raise ValueError(f"what divides the {count} experts into groups of two or more")
        return value

    @field_validator("kept_groups")
    @classmethod
    def _enough_groups(cls, value: int, info: ValidationInfo) -> int:
        if not {"count", "groups", "per_token"} <= set(info.data):
            return value
        groups, size = info.data["groups"], info.data["count"] // info.data["groups"]
        if value > groups:
            raise ValueError(f"at most the {groups} groups")
        if value * size < info.data["per_token"]:
            raise ValueError(f"so many groups of {size} that they hold the {info.data['per_token']} experts of a token")
        return value
