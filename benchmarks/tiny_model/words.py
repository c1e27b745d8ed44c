"""Word lists of the synthetic language.

They are plain data, kept apart from the grammar so that the generator stays short. Every word is frequent in the
corpus, so the tokenizer keeps it as one token; that makes token counts predictable from the text alone.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _rows(text: str) -> list[tuple[str, ...]]:
    return [tuple(row.split()) for row in text.split("|")]


ADJECTIVES = _words(
    """
    amber silver crimson golden violet azure scarlet ivory emerald copper bronze ebony pearl ruby indigo olive
    quiet gentle fierce clever sleepy brave humble proud swift patient hollow frozen burning hidden ancient
    broken narrow distant tender bitter velvet marble crystal wooden rusty dusty misty stormy sunny lonely merry
    solemn curious graceful nimble sturdy faithful restless radiant shadowy painted woven carved polished
    speckled striped feathered winding
    """
)

NOUNS = _words(
    """
    fox owl raven falcon badger otter heron lynx tiger panther dolphin turtle sparrow beetle hornet lizard
    castle tower bridge lantern compass anchor mirror locket crown dagger shield banner trumpet violin harp drum
    garden orchard meadow canyon glacier island harbor lagoon desert summit cavern valley comet planet eclipse
    meteor chariot galley wagon sleigh ladder anvil furnace kettle goblet candle ribbon scroll statue fountain
    labyrinth temple
    """
)

NAMES = _words(
    """
    Mira Tobin Elsa Ruben Clara Dario Hanna Felix Greta Igor Jonas Katya Lukas Marta Nils Olga Pavel Quinn Rosa
    Stefan Tilda Ulric Vera Walter Xenia Yusuf Zelda Anton Bruno Celia Dagmar Emil Frida Gustav Helga Ivo Jana
    Karel Lena Milos Nadia Oskar Petra Rolf Selma Tomas Ursula Viktor Wanda Yara Zoran Alma Boris Cora Denis
    Edith Flora Gideon Hugo Irma Jasper Kira Leopold Mona
    """
)

# profession, product, tool, workplace: knowing one tells the others, which is what makes a blank guessable
TRADES = _rows(
    """
    baker bread oven bakery | smith nails hammer forge | weaver cloth loom mill | potter jars wheel kiln |
    farmer wheat plough barn | fisher herring net pier | tailor coats needle shop | carpenter chairs saw
    workshop | brewer ale barrel cellar | miller flour stone watermill | printer books press office | gardener
    roses spade park | shepherd wool crook pasture | mason walls chisel quarry | cobbler shoes awl stall |
    glazier windows cutter studio | painter portraits brush attic | doctor medicine scalpel clinic | teacher
    lessons chalk school | sailor ropes winch dock | butcher sausages cleaver market | jeweler rings tweezers
    boutique | beekeeper honey smoker hive | cook soup ladle kitchen | tanner leather knife yard | cooper casks
    plane shed | clerk letters pen archive | hunter furs bow forest | miner coal pickaxe shaft | dyer silk vat
    courtyard | chandler soap mould parlour | vintner wine funnel vineyard
    """
)

# town, its river, its bird
TOWNS = _rows(
    """
    Halden Orva gulls | Brixen Tamar swans | Corvale Linde storks | Durnham Ister ducks | Elmstead Vardo geese |
    Farrow Nemi cranes | Gresham Solva larks | Hartwell Drava finches | Ingleby Morava robins | Jarrow Tisza
    crows | Kelso Arno magpies | Lindow Ebro pigeons | Marsden Loire terns | Norwick Tweed doves | Oakham Severn
    thrushes | Penrith Avon plovers | Quorn Mersey wrens | Redmire Tagus kites | Selby Oder jays | Thornby Weser
    puffins
    """
)

# season, weather, field work
SEASONS = _rows(
    """
    spring rain sowing | summer heat haymaking | autumn fog threshing | winter snow spinning
    """
)

DAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)

# creature, where it lives, what it eats
CREATURES = _rows(
    """
    frog pond flies | mole tunnel worms | squirrel oak acorns | goat hillside thistles | bear den berries | cow
    stable clover | hedgehog hedge slugs | bat belfry moths | rabbit burrow carrots | mouse pantry cheese |
    horse paddock oats | pig sty turnips
    """
)
