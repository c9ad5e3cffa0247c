"""The raw tables behind ``facts``, one fact or one subject to a line."""

# country | capital | currency | continent | language ("-" where the answer is not one plain word)
COUNTRIES = """
France|Paris|euro|Europe|French
Germany|Berlin|euro|Europe|German
Italy|Rome|euro|Europe|Italian
Spain|Madrid|euro|Europe|Spanish
Portugal|Lisbon|euro|Europe|Portuguese
Austria|Vienna|euro|Europe|German
Greece|Athens|euro|Europe|Greek
Ireland|Dublin|euro|Europe|-
Finland|Helsinki|euro|Europe|Finnish
Belgium|Brussels|euro|Europe|-
the Netherlands|Amsterdam|euro|Europe|Dutch
the Czech Republic|Prague|koruna|Europe|Czech
Iceland|Reykjavik|krona|Europe|Icelandic
England|London|pound|Europe|English
Sweden|Stockholm|krona|Europe|Swedish
Norway|Oslo|krone|Europe|Norwegian
Denmark|Copenhagen|krone|Europe|Danish
Poland|Warsaw|zloty|Europe|Polish
Hungary|Budapest|forint|Europe|Hungarian
Switzerland|Bern|franc|Europe|-
Ukraine|Kyiv|hryvnia|Europe|Ukrainian
Russia|Moscow|ruble|-|Russian
Turkey|Ankara|lira|-|Turkish
Japan|Tokyo|yen|Asia|Japanese
China|Beijing|yuan|Asia|Chinese
India|New Delhi|rupee|Asia|-
Thailand|Bangkok|baht|Asia|Thai
Vietnam|Hanoi|dong|Asia|Vietnamese
South Korea|Seoul|won|Asia|Korean
Indonesia|Jakarta|rupiah|Asia|Indonesian
Saudi Arabia|Riyadh|riyal|Asia|Arabic
Israel|Jerusalem|shekel|Asia|Hebrew
Iran|Tehran|rial|Asia|Persian
Egypt|Cairo|pound|Africa|Arabic
Kenya|Nairobi|shilling|Africa|-
Nigeria|Abuja|naira|Africa|English
Morocco|Rabat|dirham|Africa|-
Ethiopia|Addis Ababa|birr|Africa|-
Ghana|Accra|cedi|Africa|English
Canada|Ottawa|dollar|North America|-
Mexico|Mexico City|peso|North America|Spanish
Cuba|Havana|peso|North America|Spanish
the United States|Washington|dollar|North America|English
Brazil|Brasilia|real|South America|Portuguese
Argentina|Buenos Aires|peso|South America|Spanish
Chile|Santiago|peso|South America|Spanish
Peru|Lima|sol|South America|-
Colombia|Bogota|peso|South America|Spanish
Australia|Canberra|dollar|-|English
New Zealand|Wellington|dollar|-|English
"""

# element | symbol | atomic number
ELEMENTS = """
hydrogen|H|1
helium|He|2
lithium|Li|3
carbon|C|6
nitrogen|N|7
oxygen|O|8
fluorine|F|9
neon|Ne|10
sodium|Na|11
magnesium|Mg|12
aluminium|Al|13
silicon|Si|14
phosphorus|P|15
sulfur|S|16
chlorine|Cl|17
argon|Ar|18
potassium|K|19
calcium|Ca|20
titanium|Ti|22
iron|Fe|26
nickel|Ni|28
copper|Cu|29
zinc|Zn|30
silver|Ag|47
tin|Sn|50
iodine|I|53
gold|Au|79
mercury|Hg|80
lead|Pb|82
uranium|U|92
"""

OPPOSITES = """
hot|cold
big|small
tall|short
fast|slow
happy|sad
up|down
left|right
open|closed
day|night
black|white
old|young
hard|soft
heavy|light
wet|dry
full|empty
early|late
rich|poor
strong|weak
loud|quiet
clean|dirty
near|far
high|low
good|bad
easy|difficult
thick|thin
wide|narrow
begin|end
buy|sell
push|pull
win|lose
true|false
"""

YOUNG = """
dog|puppy
cat|kitten
cow|calf
horse|foal
sheep|lamb
pig|piglet
goat|kid
hen|chick
duck|duckling
goose|gosling
bear|cub
deer|fawn
kangaroo|joey
frog|tadpole
swan|cygnet
owl|owlet
"""

SOUNDS = """
dog|barks
cat|meows
cow|moos
horse|neighs
sheep|bleats
pig|oinks
duck|quacks
lion|roars
bee|buzzes
snake|hisses
frog|croaks
wolf|howls
owl|hoots
mouse|squeaks
rooster|crows
"""

COLOURS = """
the sky|blue
grass|green
snow|white
coal|black
a banana|yellow
a ripe tomato|red
a lemon|yellow
a carrot|orange
an orange|orange
a pumpkin|orange
a strawberry|red
a cherry|red
a cucumber|green
a frog|green
a leaf|green
the Sun|yellow
the sea|blue
a cloud|white
a swan|white
blood|red
milk|white
chocolate|brown
a flamingo|pink
an elephant|grey
a crow|black
an emerald|green
a ruby|red
"""

UNITS = """
seconds|a minute|60
minutes|an hour|60
hours|a day|24
days|a week|7
days|a year|365
months|a year|12
weeks|a year|52
years|a decade|10
years|a century|100
centimetres|a metre|100
metres|a kilometre|1000
grams|a kilogram|1000
millimetres|a centimetre|10
items|a dozen|12
letters|the English alphabet|26
cents|a dollar|100
seconds|an hour|3600
minutes|a day|1440
days|a leap year|366
months|half a year|6
inches|a foot|12
feet|a yard|3
"""

SHAPES = """
triangle|3
square|4
rectangle|4
pentagon|5
hexagon|6
heptagon|7
octagon|8
"""

LEGS = """
dog|4
bird|2
spider|8
ant|6
horse|4
snake|0
crab|10
octopus|8
"""

AUTHORS = """
Hamlet|William Shakespeare
Romeo and Juliet|William Shakespeare
Macbeth|William Shakespeare
Oliver Twist|Charles Dickens
War and Peace|Leo Tolstoy
Crime and Punishment|Fyodor Dostoevsky
Pride and Prejudice|Jane Austen
Don Quixote|Miguel de Cervantes
The Odyssey|Homer
Moby Dick|Herman Melville
Faust|Johann Wolfgang von Goethe
The Hobbit|J. R. R. Tolkien
Frankenstein|Mary Shelley
Dracula|Bram Stoker
1984|George Orwell
Animal Farm|George Orwell
The Divine Comedy|Dante Alighieri
Tom Sawyer|Mark Twain
Harry Potter|J. K. Rowling
Alice in Wonderland|Lewis Carroll
Robinson Crusoe|Daniel Defoe
The Little Prince|Antoine de Saint-Exupery
"""

INVENTORS = """
the telephone|Alexander Graham Bell
the light bulb|Thomas Edison
the printing press|Johannes Gutenberg
the airplane|the Wright brothers
dynamite|Alfred Nobel
the World Wide Web|Tim Berners-Lee
the radio|Guglielmo Marconi
"""

DISCOVERERS = """
gravity|Isaac Newton
penicillin|Alexander Fleming
radium|Marie Curie
the theory of relativity|Albert Einstein
the theory of evolution|Charles Darwin
"""

# Facts that stand alone: the subject is the key of their own wordings, the value a full sentence.
SINGLE = """
largest_planet|The largest planet in the solar system is Jupiter.
smallest_planet|The smallest planet in the solar system is Mercury.
closest_planet|The planet closest to the Sun is Mercury.
hottest_planet|The hottest planet in the solar system is Venus.
red_planet|The Red Planet is Mars.
ringed_planet|The planet famous for its rings is Saturn.
planet_count|There are 8 planets in the solar system.
largest_ocean|The largest ocean is the Pacific Ocean.
highest_mountain|The highest mountain on Earth is Mount Everest.
largest_animal|The largest animal is the blue whale.
fastest_land_animal|The fastest land animal is the cheetah.
tallest_animal|The tallest animal is the giraffe.
king_of_jungle|The lion is called the king of the jungle.
boiling_water|Water boils at 100 degrees Celsius.
freezing_water|Water freezes at 0 degrees Celsius.
water_formula|The chemical formula of water is H2O.
continent_count|There are 7 continents.
rainbow_count|A rainbow has 7 colours.
mona_lisa|The Mona Lisa was painted by Leonardo da Vinci.
first_moon|The first person on the Moon was Neil Armstrong.
earth_sun|The Earth takes 365 days to go around the Sun.
earth_star|The star closest to the Earth is the Sun.
earth_satellite|The natural satellite of the Earth is the Moon.
bees_make|Bees make honey.
plants_gas|Plants take in carbon dioxide.
largest_country|The largest country in the world is Russia.
largest_continent|The largest continent is Asia.
smallest_continent|The smallest continent is Australia.
"""
