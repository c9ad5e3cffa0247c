"""Wordings for the facts that stand alone (``facts.Fact.relation == "single"``)."""

# key | wordings for training, split by "/" | held-out wordings
_TABLE = """
largest_planet|What is the largest planet?/Which planet is the largest?/What is the biggest planet in the solar system?/Which planet is the biggest?/largest planet/Tell me the largest planet of the solar system.|Which is the largest planet in the solar system?/What planet is the biggest?
smallest_planet|What is the smallest planet?/Which planet is the smallest?/What is the smallest planet in the solar system?/smallest planet/Tell me the smallest planet of the solar system.|Which is the smallest planet in the solar system?/What planet is the smallest?
closest_planet|Which planet is closest to the Sun?/What is the closest planet to the Sun?/Which planet is nearest to the Sun?/What is the nearest planet to the Sun?/planet closest to the Sun|What planet is closest to the Sun?/Which is the planet nearest to the Sun?
hottest_planet|What is the hottest planet?/Which planet is the hottest?/What is the hottest planet in the solar system?/hottest planet/Tell me the hottest planet.|Which is the hottest planet in the solar system?/What planet is the hottest?
red_planet|Which planet is called the Red Planet?/Which planet is the Red Planet?/What is the Red Planet?/What planet is known as the Red Planet?/red planet/Which planet is red?|What planet is called the Red Planet?/Which planet is known as the Red Planet?
ringed_planet|Which planet has rings?/Which planet is famous for its rings?/What planet has rings?/Which planet has big rings around it?/planet with rings|What planet is famous for its rings?/Which planet is known for its rings?
planet_count|How many planets are there?/How many planets are in the solar system?/How many planets does the solar system have?/number of planets/What is the number of planets in the solar system?|How many planets are there in the solar system?/Do you know how many planets there are?
largest_ocean|What is the largest ocean?/Which ocean is the largest?/What is the biggest ocean on Earth?/Which ocean is the biggest?/largest ocean/Tell me the largest ocean.|What is the largest ocean on Earth?/What ocean is the biggest?
highest_mountain|What is the highest mountain?/Which mountain is the highest?/What is the tallest mountain in the world?/What is the highest mountain in the world?/highest mountain/Which mountain is the tallest on Earth?|What is the highest mountain on Earth?/Which is the highest mountain in the world?
largest_animal|What is the largest animal?/Which animal is the largest?/What is the biggest animal in the world?/Which animal is the biggest?/largest animal/Tell me the largest animal.|What is the largest animal on Earth?/What animal is the biggest?
fastest_land_animal|What is the fastest animal on land?/Which land animal is the fastest?/What is the fastest land animal?/Which animal runs the fastest?/fastest animal/Which animal is the fastest?|What animal is the fastest on land?/Which is the fastest land animal?
tallest_animal|What is the tallest animal?/Which animal is the tallest?/What is the tallest animal in the world?/tallest animal/Tell me the tallest animal.|What is the tallest animal on Earth?/What animal is the tallest?
king_of_jungle|Which animal is the king of the jungle?/Who is the king of the jungle?/What animal is called the king of the jungle?/king of the jungle/Who is called the king of the jungle?|Which animal is called the king of the jungle?/What is the king of the jungle?
boiling_water|At what temperature does water boil?/What is the boiling point of water?/When does water boil?/boiling point of water/How hot is boiling water?/At how many degrees does water boil?|At which temperature does water boil?/Tell me the boiling point of water.
freezing_water|At what temperature does water freeze?/What is the freezing point of water?/When does water freeze?/freezing point of water/How cold is freezing water?/At how many degrees does water freeze?|At which temperature does water freeze?/Tell me the freezing point of water.
water_formula|What is the formula of water?/What is the chemical formula of water?/What is the chemical formula for water?/Which formula does water have?/formula of water/How is water written in chemistry?|What is the formula for water?/Which chemical formula does water have?
continent_count|How many continents are there?/How many continents does the Earth have?/What is the number of continents?/number of continents/How many continents are on Earth?|How many continents are there on Earth?/Do you know how many continents there are?
rainbow_count|How many colours does a rainbow have?/How many colors are in a rainbow?/How many colours are there in a rainbow?/How many colors has a rainbow?/colours of a rainbow|How many colors does a rainbow have?/How many colours are in a rainbow?
mona_lisa|Who painted the Mona Lisa?/Who is the painter of the Mona Lisa?/By whom was the Mona Lisa painted?/Which artist painted the Mona Lisa?/Tell me who painted the Mona Lisa./the painter of the Mona Lisa|Which painter painted the Mona Lisa?/Who was the painter of the Mona Lisa?
first_moon|Who was the first person on the Moon?/Who was the first man on the Moon?/Who first walked on the Moon?/Which person was first on the Moon?/first man on the Moon/Who walked on the Moon first?|Who was the first human on the Moon?/Who was the first to walk on the Moon?
earth_sun|How long does the Earth take to go around the Sun?/How many days does the Earth need to go around the Sun?/In how many days does the Earth go around the Sun?/How long does it take the Earth to go around the Sun?|How many days does the Earth take to go around the Sun?/How long does the Earth need to go around the Sun?
earth_star|Which star is closest to the Earth?/What is the closest star to the Earth?/What is the nearest star?/Which star is nearest to us?/closest star|What star is closest to the Earth?/Which is the nearest star to the Earth?
earth_satellite|What is the natural satellite of the Earth?/Which natural satellite does the Earth have?/What goes around the Earth?/What is the satellite of the Earth?/natural satellite of the Earth|Which is the natural satellite of the Earth?/What natural satellite does the Earth have?
bees_make|What do bees make?/What do bees produce?/What does a bee make?/Which food do bees make?/What comes from bees?|What food do bees make?/What is made by bees?
plants_gas|Which gas do plants take in?/What gas do plants need?/What gas do plants take in?/Which gas do plants breathe in?/Which gas do plants use?|What gas do plants use?/Which gas do plants need?
largest_country|What is the largest country?/Which country is the largest?/What is the biggest country in the world?/Which country is the biggest?/largest country/What is the largest country on Earth?|What is the largest country in the world?/What country is the biggest?
largest_continent|What is the largest continent?/Which continent is the largest?/What is the biggest continent?/Which continent is the biggest?/largest continent|Which is the largest continent?/What continent is the biggest?
smallest_continent|What is the smallest continent?/Which continent is the smallest?/Tell me the smallest continent./smallest continent/What is the smallest continent on Earth?|Which is the smallest continent?/What continent is the smallest?
"""  # noqa: E501 - one fact to a line reads better than wrapped ones


_TRAIN_FRAMES = ("{q}", "{q}", "Do you know: {q}", "Can you tell me: {q}", "Tell me: {q}")
_HELD_OUT_FRAMES = ("{q}", "{q}", "Please answer this: {q}")


def _framed(frames: tuple[str, ...], questions: str) -> tuple[str, ...]:
    return tuple(f.replace("{q}", q) for q in questions.split("/") for f in frames)


def _parse() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    rows = (line.split("|") for line in _TABLE.strip().splitlines())
    return {
        key: (_framed(_TRAIN_FRAMES, train), _framed(_HELD_OUT_FRAMES, held))
        for key, train, held in rows
    }


SINGLES = _parse()
"""Per key: (wordings for training, held-out wordings)."""
