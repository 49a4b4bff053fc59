"""A site's table in the machine's cache, so that a file is read once and not for every message."""

from fedsim.data import cache
from fedsim.data.federated import DataRecipe
from fedsim.data.reading.files import LocalFiles
from fedsim.data.reading.mapping import Roles
from fedsim.data.sites.tables import HowToRead, SiteTable, read_site


def stored_site(files: LocalFiles, how: HowToRead, recipe: DataRecipe) -> SiteTable:
    """Return a site's table, read once as long as its file is the same.

    Args:
        files: The site's file, or those of its folder.
        how: How they are read.
        recipe: Where the cache is.

    Raises:
        ScenarioError: If the file cannot be used.
    """

    def make() -> cache.Content:
        table = read_site(files, how)
        arrays = {"features": table.features, "targets": table.targets}
        info = {
            "target_kind": table.target_kind,
            "roles": list(table.roles),
            "preprocessing": table.preprocessing,
            "said": list(table.said),
        }
        return cache.Content(arrays, info)

    key = {"file": files.identity, "root": str(files.root), "how": repr(how)}
    arrays, info = cache.entry(recipe.cache_dir, "site", key, make)
    features, target, kind = info["roles"]
    return SiteTable(
        arrays["features"],
        arrays["targets"],
        info["target_kind"],
        Roles(tuple(features), tuple(target), kind),
        info["preprocessing"],
        tuple(info["said"]),
    )
