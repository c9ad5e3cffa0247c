"""Conversations and texts for real models. There are no right answers: what the model says when it
skips is compared with what it says in full."""

from __future__ import annotations

# first turn | second turn
_CONVERSATIONS = """
Write a short postcard from a holiday by the sea.|Now write it again as if it had rained all week.
Describe a busy train station in one paragraph.|Rewrite your paragraph from the point of view of a child.
You are a museum guide. Greet a school class at the door.|One child asks why they may not touch anything. Answer.
Tom is taller than Ann, and Ann is taller than Kim. Who is the shortest?|And if Kim grows taller than Tom, who is the shortest then?
A ticket costs 12 euros and children pay half. What do two adults and three children pay?|How much change do they get from 50 euros?
Write a Python function that returns the largest number in a list.|Change it so that an empty list gives None.
Write a Python function that counts the vowels in a string.|Explain line by line what your function does.
Name the place and the date in: The market in Halden opens on 3 May at nine.|Write both as JSON.
Explain how a rainbow forms.|Why can one never reach its end?
What does the heart do?|How does that change when somebody runs?
How can I sleep better?|Which of these is the easiest to start with, and why?
Give me three tips for learning a language.|Make a plan for one week out of them.
"""  # noqa: E501

# one to a line
_ARTICLES = """
The town council of Marlow has decided to close the old bridge to cars from next spring. Engineers found cracks in two of the stone arches last autumn, and lorries have been kept off it since. Cyclists and people on foot may still cross. The repair will cost about two million pounds, of which the county pays half. Shop owners on the north bank fear that they will lose customers, since the next bridge is four miles away. The council has promised a free bus across the river every ten minutes. A petition against the plan has gathered eleven hundred names, and a public meeting will be held in the town hall on Thursday.
Researchers at a coastal station have followed forty sea turtles for three years with small transmitters. They expected the animals to stay close to the beach on which they had hatched. Instead, more than half of them swam to a feeding ground nine hundred kilometres away, and came back in the same month each year. The team believes that the turtles follow lines of the magnetic field of the Earth. When a storm moved two of them far off their way, both found back within a fortnight. The findings will help to decide where fishing should be limited. A second study, with younger animals, begins in the summer.
A family bakery in the north of the country has become the largest maker of rye bread in the region. It was founded in 1931 with a single oven. The present owner, a granddaughter of the founder, took over twelve years ago, when the firm had nine workers; today it has two hundred. She says that the secret is patience: the dough rests for a whole day. Last year the bakery sold six million loaves, a third of them abroad. A rival offered to buy it in March, and she refused. Now she plans a second factory, which is to run on heat from the ovens of the first.
Heavy snow has cut off several villages in the mountains since Sunday. More than a metre fell within two days, and the only road in the valley is blocked by an avalanche. Nobody was hurt. Helicopters brought medicine and bread to about three hundred people on Tuesday. Schools stay shut until the end of the week. The power came back to most houses after a night without light, but the telephone lines are still down. The weather service expects milder air from Friday on, and warns that more snow may then slide from the slopes. Skiers are asked to keep to the marked ways.
The women of Riverside won the cup for the first time in their history on Saturday. They beat the champions of the last four years by two goals to one in front of twelve thousand people. After a poor first half, in which they hardly crossed the middle line, their coach brought on a player of seventeen. She scored with her first touch and gave the pass for the second goal. The champions hit the post in the last minute. The captain said afterwards that the team had trained in a car park for most of the winter, as their ground was under water. The city will honour them on Monday.
Workers who dug a trench for a water pipe have come upon the floor of a Roman house. The mosaic shows dolphins around a ship and is almost whole. Archaeologists think that it belonged to a merchant who grew rich with wine and oil. Beneath a wall they found a pot with two hundred coins, the last of them struck in the year 270. It seems that the owner hid his money from an enemy and never returned. The pipe will now be laid in a curve around the site. The mosaic is to be covered with sand for the winter, and shown to visitors under a glass roof in two years.
Doctors at five hospitals have tested whether a daily walk helps people after an operation of the knee. Half of the four hundred patients walked for twenty minutes every day from the third day on; the others rested as usual for two weeks. After three months the walkers had less pain and climbed stairs faster. They also took fewer tablets. There was no difference in how often the knee had to be operated on again. The doctors warn that the walks were short and on flat ground, and that patients with a weak heart did not take part. They advise to begin slowly and to stop when the knee swells.
A village without a post office now gets its letters by drone. Twice a day a small aircraft lands behind the school, on a field of the size of a tennis court. It carries up to four kilograms over the bay, a flight of six minutes, for which the ferry takes an hour. In a strong wind it stays on the ground, which happened on thirty days last year. The company behind it says that a flight costs less than a stamp on the parcel. Some people complain of the noise, and a farmer of frightened sheep. The trial ends in October; the island's council will then vote on it.
"""  # noqa: E501


def conversations() -> list[tuple[str, str]]:
    """The two turns of the user."""
    rows = (line.split("|") for line in _CONVERSATIONS.strip().splitlines())
    return [(first, second) for first, second in rows]


def articles() -> list[str]:
    """Texts of about 110 words."""
    return _ARTICLES.strip().splitlines()
