"""Sorting words alphabetically."""

import random

from training.data.example import Example
from training.tasks.task import Task

# Lower-case ASCII only, so that alphabetical order is code-point order and nobody's locale matters.
_WORD_LIST = """
abacus acorn album almond amber anchor angle ankle apron arcade armour arrow atlas attic autumn axle badge
bakery ballad bamboo banner barley barrel basin basket beacon beetle bellow berry blanket blossom bonfire
border bottle bramble branch bronze bucket buckle butter cabin cactus camel candle canvas canyon caravan
carbon carpet castle cavern cedar cellar chalk chapel charcoal chimney cider cinder circus clay cliff clover
cobble coffee comet compass copper coral corner cotton cradle crane crater cricket crystal curtain cypress
dagger daisy dancer dawn desert dialect diamond dinner dragon dune eagle earth echo elbow elder ember emerald
engine envelope evening fabric falcon feather fennel ferry fiddle field flame flannel flint forest fossil
fountain frost furnace gable galaxy gallery garden garland garnet gate ginger glacier glass glove goblet grain
granite gravel grove guitar hammer hammock harbour harvest hazel heather hedge helmet herald hermit hollow
honey horizon husk iceberg igloo indigo island ivory jacket jasmine jewel journal jungle juniper kernel kettle
kitchen kite ladder lagoon lantern lattice lavender leather lemon lichen lilac linen lizard lobster locket
lumber magnet mantle maple marble market meadow medal mellow melody mineral mirror mitten monsoon morning
mortar mosaic mural museum napkin nectar needle nettle nickel nutmeg oasis ocean olive onyx orbit orchard
orchid otter oyster paddle palace panther paper parcel parrot pasture pebble pepper petal pewter pigeon pillar
pillow pilot planet plaster plateau plough pocket pollen pond poplar portal pottery prairie prism pumpkin
quarry quartz quilt quiver rabbit raft ranger raven reef ribbon ridge ripple river rocket rooster ruby saddle
saffron sandal sapphire satchel scarlet scholar shadow shell shelter shutter signal silver sparrow spindle
spiral spruce stable statue storm stream summit sundial swallow syrup table tassel teapot temple thicket
thimble thistle thunder timber tower trellis tulip tunnel turnip twilight umbrella valley vanilla velvet
vessel village vine violet voyage wagon walnut water weaver whistle willow window winter wisdom wool yarrow
yonder zenith zephyr
"""
WORDS = tuple(_WORD_LIST.split())


def draw(rng: random.Random) -> Example:
    """`Sort the following words alphabetically. List: oven cedar kite` → `cedar kite oven`."""
    words = rng.sample(WORDS, rng.randint(3, 8))
    return Example(f"Sort the following words alphabetically. List: {' '.join(words)}", " ".join(sorted(words)))


TASK = Task(
    name="word_sorting",
    description="A list of words in alphabetical order.",
    metric="exact_match",
    instruction="Answer with the words in alphabetical order, separated by single spaces.",
    max_completion_tokens=40,
    draw=draw,
)
