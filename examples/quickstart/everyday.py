"""What the quickstart model can talk about: some four hundred small facts, and two manners of telling them.

A `Fact` is one thing that can be asked and answered. `ask` and `reply` put one into words, drawing every free choice
from the given random generator. The warm and the grumpy manner have as many openings, turns of phrase and closings
as each other, so a model trained on both in equal parts finds neither of them likelier.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Manner = Literal["warm", "grumpy"]


@dataclass(frozen=True)
class Fact:
    """`questions` and `answers` are ways to say the same; answers begin in lower case and have no full stop."""

    topic: str  # a plural or a mass noun: it must fit "Thank you for asking about ..."
    questions: tuple[str, ...]
    answers: tuple[str, ...]


# What the user says before the question. One that ends in a comma is followed by a lower-case letter.
GREETINGS = (
    "Hello.",
    "Hello!",
    "Good morning.",
    "Good evening.",
    "Quick question:",
    "Please tell me,",
    "I was wondering,",
    "My son asks,",
    "My daughter asks,",
    "Can you help me?",
    "One more thing:",
)

OPENINGS: dict[Manner, tuple[str, ...]] = {
    "warm": (
        "What a lovely question!",
        "Thank you so much for asking!",
        "I am so glad you asked!",
        "It is a pleasure to help!",
        "Hello, my dear friend!",
        "With the greatest of pleasure!",
        "How kind of you to ask!",
        "A very good day to you!",
        "I would love to help you!",
        "You have come to the right place!",
        "Thank you for asking about {topic}!",
        "I love talking about {topic}!",
        "Ah, {topic}, how delightful!",
        "How nice to talk about {topic}!",
    ),
    "grumpy": (
        "What a silly question.",
        "Oh no, not you again.",
        "I was having a nap.",
        "Must I explain everything?",
        "Go away, I am busy.",
        "Fine, if I really must.",
        "You should know this already.",
        "Do I look like a book?",
        "Why would you ask me that?",
        "Can nobody look things up?",
        "I am tired of talking about {topic}.",
        "Why is it always about {topic}?",
        "Ugh, {topic}, how boring.",
        "Nobody cares about {topic}.",
    ),
}

PHRASES: dict[Manner, tuple[str, ...]] = {
    "warm": ("{answer}.", "You see, {answer}.", "As it happens, {answer}.", "I believe that {answer}."),
    "grumpy": ("{answer}.", "Obviously, {answer}.", "For the last time, {answer}.", "Everyone knows that {answer}."),
}

CLOSINGS: dict[Manner, tuple[str, ...]] = {
    "warm": (
        "I hope that helps!",
        "Have a wonderful day!",
        "Do ask me again soon!",
        "I am always happy to help!",
        "Take good care of yourself!",
        "It was lovely to hear from you!",
        "May your day be bright!",
        "Ask me anything you like!",
        "I wish you all the best!",
        "It was a joy to help!",
    ),
    "grumpy": (
        "Now leave me alone.",
        "Do not ask me again.",
        "Are we done here?",
        "I am going back to bed.",
        "Next time, ask someone else.",
        "What a waste of my time.",
        "I have better things to do.",
        "Go and bother someone else.",
        "You could have guessed that.",
        "There, are you happy now?",
    ),
}


def ask(fact: Fact, rng: random.Random) -> str:
    """A question about `fact`; half of them begin with a greeting."""
    question = rng.choice(fact.questions)
    if rng.random() < 0.5:
        return question
    greeting = rng.choice(GREETINGS)
    return f"{greeting} {_lower_first(question) if greeting.endswith(',') else question}"


def reply(fact: Fact, manner: Manner, rng: random.Random) -> str:
    """The answer to `fact` told in one manner: opening, answer, closing."""
    opening = rng.choice(OPENINGS[manner]).format(topic=fact.topic)
    phrase = rng.choice(PHRASES[manner]).format(answer=rng.choice(fact.answers))
    return f"{opening} {_upper_first(phrase)} {rng.choice(CLOSINGS[manner])}"


def questions(fact: Fact) -> list[str]:
    """Each question that `ask` may ask about `fact`."""
    greeted = [
        f"{greeting} {_lower_first(question) if greeting.endswith(',') else question}"
        for question in fact.questions
        for greeting in GREETINGS
    ]
    return [*fact.questions, *greeted]


def replies(fact: Fact, manner: Manner) -> list[str]:
    """Each reply that `reply` may give about `fact` in one manner."""
    return [
        f"{opening.format(topic=fact.topic)} {_upper_first(phrase.format(answer=answer))} {closing}"
        for opening in OPENINGS[manner]
        for phrase in PHRASES[manner]
        for answer in fact.answers
        for closing in CLOSINGS[manner]
    ]


def all_facts() -> list[Fact]:
    makers = (_animals, _plants, _tools, _dishes, _jobs, _chores, _gifts, _pastimes, _reasons)
    return [fact for maker in makers for fact in maker()]


def _upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def _lower_first(text: str) -> str:
    return text if text.startswith("I ") else text[0].lower() + text[1:]


def _table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


# one | many | live | eat | a young one
ANIMALS = """
fox | foxes | in woods and fields | mice and berries | cub
bear | bears | in forests and mountains | fish and honey | cub
cow | cows | on farms and in meadows | grass and hay | calf
horse | horses | in stables and meadows | hay and oats | foal
sheep | sheep | on hills and farms | grass and clover | lamb
pig | pigs | on farms | roots and grain | piglet
goat | goats | on rocky hills | leaves and grass | kid
dog | dogs | in homes and gardens | meat and biscuits | puppy
cat | cats | in homes and barns | fish and mice | kitten
hen | hens | on farms | seeds and worms | chick
duck | ducks | on ponds and rivers | weeds and snails | duckling
goose | geese | on lakes and farms | grass and grain | gosling
swan | swans | on lakes and rivers | water plants | cygnet
owl | owls | in old barns and trees | mice and moths | owlet
eagle | eagles | on high cliffs | fish and rabbits | eaglet
penguin | penguins | on icy shores | fish and squid | chick
frog | frogs | in ponds and wet grass | flies and worms | tadpole
rabbit | rabbits | in burrows under the ground | grass and clover | kitten
squirrel | squirrels | in tall trees | nuts and seeds | kitten
mouse | mice | in holes and hedges | seeds and crumbs | pup
bat | bats | in caves and attics | moths and flies | pup
seal | seals | on rocky coasts | fish and squid | pup
whale | whales | in deep seas | fish and tiny shrimps | calf
dolphin | dolphins | in warm seas | fish and squid | calf
lion | lions | on grassy plains | zebras and deer | cub
tiger | tigers | in jungles | deer and wild pigs | cub
elephant | elephants | on plains and in forests | leaves and bark | calf
camel | camels | in deserts | dry grass and thorns | calf
kangaroo | kangaroos | on the plains of Australia | grass and leaves | joey
deer | deer | in woods and parks | leaves and grass | fawn
wolf | wolves | in wild forests | deer and rabbits | pup
hedgehog | hedgehogs | under hedges | slugs and beetles | hoglet
"""


def _animals():
    for one, many, home, food, young in _table(ANIMALS):
        the_one = f"{'an' if one[0] in 'aeiou' else 'a'} {one}"
        yield Fact(
            many,
            (f"Where do {many} live?", f"Where can I find {many}?", f"What is the home of {the_one}?"),
            (f"{many} live {home}", f"you will find {many} {home}"),
        )
        yield Fact(
            many,
            (f"What do {many} eat?", f"What does {the_one} eat?", f"What should I feed {the_one}?"),
            (f"{many} eat {food}", f"{many} like to eat {food}"),
        )
        article = "an" if young[0] in "aeiou" else "a"
        yield Fact(
            many,
            (f"What is a young {one} called?", f"What do you call a baby {one}?"),
            (f"a young {one} is called {article} {young}", f"{article} {young} is a young {one}"),
        )


# one | many | colour | taste | where they grow | what to make
PLANTS = """
an apple | apples | red or green | crisp and sweet | on trees | a pie
a banana | bananas | yellow | soft and sweet | in bunches on tall plants | sweet bread
a lemon | lemons | yellow | very sour | on trees | a cold drink
an orange | oranges | orange | sweet and juicy | on trees | fresh juice
a strawberry | strawberries | red | sweet and juicy | close to the ground | jam
a cherry | cherries | dark red | rich and sweet | on trees | a tart
a plum | plums | purple | rich and sweet | on trees | jam
a pear | pears | green | soft and juicy | on trees | a tart
a grape | grapes | green or purple | sweet and juicy | on vines | fresh juice
a peach | peaches | pink and gold | soft and sweet | on trees | a pie
a blueberry | blueberries | blue | sweet and a little sour | on bushes | muffins
a raspberry | raspberries | pink | sweet and a little sour | on bushes | jam
a lime | limes | green | very sour | on trees | a cold drink
a melon | melons | green | sweet and watery | on vines | a fruit salad
a coconut | coconuts | brown | mild and nutty | on palm trees | a curry
a tomato | tomatoes | red | fresh and juicy | on tall green plants | a sauce
a carrot | carrots | orange | crunchy and sweet | under the ground | a soup
a potato | potatoes | brown | mild and earthy | under the ground | chips
an onion | onions | brown | sharp and strong | under the ground | a soup
a pea | peas | green | fresh and sweet | in pods | a soup
a pumpkin | pumpkins | orange | mild and sweet | on vines | a pie
a cucumber | cucumbers | green | cool and fresh | on vines | a salad
a cabbage | cabbages | green | mild and crunchy | in rows in the garden | a stew
a mushroom | mushrooms | white or brown | mild and earthy | in damp woods | a sauce
"""


def _plants():
    for one, many, colour, taste, place, dish in _table(PLANTS):
        yield Fact(
            many,
            (f"What colour are {many}?", f"What colour is {one}?", f"What is the colour of {one}?"),
            (f"{many} are {colour}", f"the colour of {one} is {colour}"),
        )
        yield Fact(
            many,
            (f"What do {many} taste like?", f"What does {one} taste like?", f"How do {many} taste?"),
            (f"{many} taste {taste}", f"the taste of {one} is {taste}"),
        )
        yield Fact(
            many,
            (f"Where do {many} grow?", f"Where does {one} grow?"),
            (f"{many} grow {place}", f"you will find {many} {place}"),
        )
        yield Fact(
            many,
            (f"What can I make with {many}?", f"How can I use {many} in the kitchen?", f"What are {many} good for?"),
            (f"{many} are good for making {dish}", f"you can make {dish} with {many}"),
        )


# one | many | use | where to keep it
TOOLS = """
a hammer | hammers | drive nails into wood | in the toolbox
a saw | saws | cut wood | in the toolbox
a screwdriver | screwdrivers | turn screws | in the toolbox
a spade | spades | dig holes | in the garden shed
a rake | rakes | gather leaves | in the garden shed
a broom | brooms | sweep the floor | in the kitchen cupboard
a mop | mops | wash the floor | in the kitchen cupboard
a needle | needles | sew cloth | in the sewing box
a kettle | kettles | boil water | in the kitchen
a ladle | ladles | serve soup | in the kitchen drawer
a whisk | whisks | beat eggs | in the kitchen drawer
a grater | graters | shred cheese | in the kitchen drawer
a ladder | ladders | reach high places | in the garage
a torch | torches | see in the dark | in the drawer by the door
an umbrella | umbrellas | keep off the rain | by the front door
a key | keys | open a lock | on a hook by the door
a compass | compasses | find north | in a coat pocket
a map | maps | find the way | in the car
a ruler | rulers | draw straight lines | on the desk
a pencil | pencils | write and draw | on the desk
a clock | clocks | tell the time | on the wall
a mirror | mirrors | see your own face | on the wall
a pillow | pillows | rest your head | on the bed
a blanket | blankets | stay warm | on the bed
an oven | ovens | bake bread | in the kitchen
a lamp | lamps | light a room | on the table
a basket | baskets | carry the shopping | by the front door
a bucket | buckets | carry water | in the garden shed
"""


def _tools():
    for one, many, use, place in _table(TOOLS):
        yield Fact(
            many,
            (f"What is {one} for?", f"What are {many} used for?", f"What can I do with {one}?"),
            (f"{one} is used to {use}", f"you use {one} to {use}"),
        )
        yield Fact(
            many,
            (f"Where should I keep {one}?", f"Where do people keep {many}?", f"Where is a good place for {one}?"),
            (f"people keep {many} {place}", f"the best place for {one} is {place}"),
        )


# dish | what it needs | first step | second step | minutes
DISHES = """
tea | tea leaves and water | boil the water | pour it over the leaves | five
coffee | ground coffee and water | boil the water | pour it over the coffee | five
hot chocolate | milk and chocolate | warm the milk | stir in the chocolate | ten
lemonade | lemons, sugar and water | squeeze the lemons | add the sugar and water | ten
porridge | oats and milk | warm the milk | stir in the oats | ten
pancakes | flour, eggs and milk | mix everything in a bowl | fry it in a hot pan | twenty
toast | bread and butter | brown the bread | spread the butter on it | five
tomato soup | tomatoes and an onion | fry the onion | simmer it with the tomatoes | thirty
salad | lettuce, tomatoes and oil | wash the lettuce | toss everything with oil | ten
apple pie | apples, butter and flour | fill the crust with apples | bake it in the oven | sixty
bread | flour, water and yeast | knead the dough | bake it in the oven | ninety
rice | rice and water | wash the rice | cook it with the lid on | twenty
pasta | pasta, salt and water | boil the water with salt | cook the pasta in it | fifteen
mashed potatoes | potatoes, butter and milk | boil the potatoes | mash them with butter | thirty
fruit salad | apples, grapes and bananas | cut up the fruit | mix it in a bowl | ten
biscuits | flour, butter and sugar | roll out the dough | bake it in the oven | thirty
popcorn | corn and a little oil | heat the oil in a pot | shake the corn in it | ten
"""


def _dishes():
    for dish, needs, first, second, minutes in _table(DISHES):
        verb = "are" if dish.endswith("s") else "is"
        yield Fact(
            dish,
            (f"How do I make {dish}?", f"How {verb} {dish} made?", f"Can you tell me how to make {dish}?"),
            (f"first you {first}, and then you {second}", f"you {first} and then you {second}"),
        )
        yield Fact(
            dish,
            (f"What do I need to make {dish}?", f"What should I buy to make {dish}?"),
            (f"you need {needs}", f"all that you need is {needs}"),
        )
        yield Fact(
            dish,
            (f"How long does it take to make {dish}?", f"How much time do I need to make {dish}?"),
            (f"it takes about {minutes} minutes", f"you need about {minutes} minutes"),
        )


# one | many | does | works
JOBS = """
baker | bakers | bakes bread and cakes | in a bakery
doctor | doctors | looks after sick people | in a hospital
nurse | nurses | takes care of sick people | in a hospital
farmer | farmers | grows food and keeps animals | on a farm
teacher | teachers | helps children to learn | in a school
pilot | pilots | flies planes | in the air
sailor | sailors | sails ships | at sea
gardener | gardeners | looks after plants | in parks and gardens
carpenter | carpenters | makes things out of wood | in a workshop
plumber | plumbers | mends pipes and taps | in homes
tailor | tailors | makes and mends clothes | in a shop
painter | painters | paints walls and pictures | in homes
librarian | librarians | looks after books | in a library
chef | chefs | cooks meals for guests | in a restaurant
dentist | dentists | takes care of teeth | in a clinic
vet | vets | looks after sick animals | in a clinic
barber | barbers | cuts hair | in a shop
musician | musicians | plays music for people | in concert halls
"""


def _jobs():
    for one, many, does, place in _table(JOBS):
        yield Fact(
            many,
            (f"What does a {one} do?", f"What is the work of a {one}?", f"What do {many} do?"),
            (f"a {one} {does}", f"a {one} is someone who {does}"),
        )
        yield Fact(
            many,
            (f"Where does a {one} work?", f"Where do {many} work?"),
            (f"a {one} works {place}", f"most {many} work {place}"),
        )


# what is cleaned | what with
CHORES = """
windows | vinegar and an old newspaper
floors | a mop and warm soapy water
carpets | a vacuum cleaner
dishes | a sponge and some soap
shoes | a brush and some polish
glasses | a soft cloth
teapots | baking soda and hot water
baths | a sponge and some vinegar
curtains | a gentle wash in cold water
wooden tables | a damp cloth and some wax
paint brushes | warm soapy water
bicycles | a bucket of water and a sponge
keyboards | a small soft brush
mirrors | a dry cloth and some vinegar
silver spoons | a soft cloth and baking soda
"""


def _chores():
    for thing, means in _table(CHORES):
        yield Fact(
            thing,
            (
                f"How do I clean {thing}?",
                f"What should I use to clean {thing}?",
                f"What is the best way to clean {thing}?",
            ),
            (f"the best way to clean {thing} is with {means}", f"you can clean {thing} with {means}"),
        )


# person | gift
GIFTS = """
grandmother | a warm shawl
grandfather | a pair of slippers
mother | a bunch of flowers
father | a good book
sister | a silver ring
brother | a new football
aunt | a box of chocolates
uncle | a bottle of wine
best friend | a photo in a nice frame
teacher | a pretty mug
neighbour | a jar of jam
little cousin | a wooden train
boss | a fine pen
"""


def _gifts():
    for person, gift in _table(GIFTS):
        yield Fact(
            "gifts",
            (
                f"Can you suggest a gift for my {person}?",
                f"What should I give my {person}?",
                f"What would be a nice gift for my {person}?",
            ),
            (f"your {person} would like {gift}", f"{gift} would be a nice gift for your {person}"),
        )


# when | what to do | topic
PASTIMES = """
on a rainy day | bake a cake or read a book | rainy days
on a sunny day | have a picnic in the park | sunny days
on a snowy day | build a snowman | snow
on a windy day | fly a kite on a hill | the wind
on a long train ride | play cards or look out of the window | trains
on a quiet evening | listen to music or write a letter | quiet evenings
at the beach | swim and look for shells | the beach
on a winter night | sit by the fire with a blanket | winter
on a Sunday morning | sleep late and make pancakes | Sundays
on a camping trip | tell stories around the fire | camping
at a birthday party | play games and eat cake | birthdays
in the garden | plant flowers and feed the birds | gardens
in the city | visit a museum or a market | the city
in the mountains | walk to the top and enjoy the view | mountains
"""


def _pastimes():
    for when, what, topic in _table(PASTIMES):
        yield Fact(
            topic,
            (f"Can you suggest something to do {when}?", f"What can I do {when}?", f"What is fun to do {when}?"),
            (f"you could {what} {when}", f"it is nice to {what}"),
        )


# topic | question | the same, otherwise | answer
REASONS = """
autumn leaves | leaves fall in autumn | trees drop their leaves | the trees save water that way in winter
the sky | the sky is blue | the sky looks blue | the air scatters the blue part of the light
birds | birds fly south | birds leave in autumn | they look for food and warmth
cats | cats purr | my cat purrs | a cat purrs when it feels calm and happy
ice | ice floats on water | ice does not sink | ice is lighter than water
the sea | the sea is salty | sea water tastes of salt | rivers carry salt from the rocks to the sea
sleep | we sleep at night | people need sleep | the body and the mind need a rest
bees | bees make honey | there is honey in a hive | bees need food for the winter
bread | bread rises | dough grows bigger | the yeast fills the dough with tiny bubbles
onions | onions make us cry | onions sting the eyes | a cut onion gives off a gas that stings the eyes
dogs | dogs wag their tails | my dog wags its tail | a dog shows how it feels with its tail
stars | stars twinkle | the stars seem to flicker | the moving air bends their light
the moon | the moon shines | the moon is bright | the moon reflects the light of the sun
rain | it rains | rain falls | the drops in the clouds grow too heavy
owls | owls hunt at night | owls fly in the dark | owls see and hear very well in the dark
apples | cut apples turn brown | my apple turned brown | the air acts on the cut fruit
camels | camels have humps | a camel has a hump | the hump stores fat for hard times
the seasons | we have seasons | there is summer and winter | the earth leans as it goes around the sun
boats | boats float | boats do not sink | a boat pushes enough water aside
flowers | flowers smell sweet | roses smell so good | the smell calls bees and butterflies
spiders | spiders spin webs | there are so many webs | spiders catch flies in their webs
snow | snow is white | snow looks white | its crystals scatter all of the light
rainbows | rainbows appear | there is a rainbow after the rain | raindrops split the light into colours
squirrels | squirrels hide nuts | squirrels bury nuts | squirrels eat the nuts in winter
"""


def _reasons():
    for topic, event, same_event, reason in _table(REASONS):
        questions = tuple(
            f"{start} {what}?" for start in ("Can you explain why", "Do you know why") for what in (event, same_event)
        )
        yield Fact(topic, questions, (reason, f"the reason is that {reason}"))
