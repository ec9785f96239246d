"""Regions and geometries: what they accept, what they add up to."""

from __future__ import annotations

import pytest

from ckptd.errors import ConfigError
from ckptd.memory.regions import MAX_REGION_PAGES, MAX_REGIONS, Geometry, Region


def test_a_geometry_adds_up_its_regions() -> None:
    geometry = Geometry.of(low=160, ram=256, rom=1)
    assert (geometry.pages, geometry.size_bytes, len(geometry)) == (417, 417 * 4096, 3)
    assert [region.name for region in geometry] == ["low", "ram", "rom"]
    assert geometry[1] == Region("ram", 256)
    assert str(geometry) == "low 640 KiB + ram 1 MiB + rom 4 KiB"


@pytest.mark.parametrize("pages", [0, -1, MAX_REGION_PAGES + 1])
def test_a_region_has_at_least_one_page_and_at_most_2_to_the_32(pages: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Region("ram", pages)
    assert caught.value.where["region"] == "ram"
    assert Region("ram", MAX_REGION_PAGES).pages == 1 << 32


def test_a_guest_has_regions_with_different_names() -> None:
    with pytest.raises(ConfigError, match="1 to 1024 regions, not 0"):
        Geometry(())
    with pytest.raises(ConfigError, match="not 1025"):
        Geometry(tuple(Region(str(number), 1) for number in range(MAX_REGIONS + 1)))
    with pytest.raises(ConfigError, match="must differ"):
        Geometry((Region("ram", 1), Region("ram", 2)))
