"""`radiogat suggest`: the places that are best measured next."""

import sys

from radiogat.commands._files import grid_for, learned
from radiogat.config import SuggestSettings
from radiogat.maps import write_csv
from radiogat.pictures import suggestion_picture
from radiogat.planes import unproject
from radiogat.suggest import reach_of
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: SuggestSettings, invocation: Invocation) -> None:
    """Write ``suggestions.csv`` and a picture, and print the places."""
    folder = invocation.folder
    estimator = learned(settings.run)
    scene = estimator.scene_
    grid = grid_for(estimator.samples_, scene, settings.cell)
    found = estimator.predict(grid, interval=0.9)
    reach = settings.reach or reach_of(estimator.samples_)
    sys.stdout.write(f"a measurement informs over {reach:.3g} meters{'' if settings.reach else ', by the variogram'}\n")
    places = found.suggest(settings.count, reach)
    names, columns = ["x", "y"], list(places.T)
    if estimator.samples_.crs:
        names, columns = [*names, "lon", "lat"], [*columns, *unproject(places, estimator.samples_.crs).T]
    write_csv(folder.own("suggestions.csv"), names, columns)
    building = found.layout.building
    width = found.error_bar.mean(axis=0)
    suggestion_picture(folder.figure("suggestions"), grid, width, places, estimator.samples_, building)
    decimals = {"lon": 6, "lat": 6}
    shown = [
        [f"{value:.{decimals.get(name, 1)}f}" for value in column] for name, column in zip(names, columns, strict=True)
    ]
    rows = [[str(number), *row] for number, row in enumerate(zip(*shown, strict=True), 1)]
    sys.stdout.write(table(["place", *names], rows) + "\n")
