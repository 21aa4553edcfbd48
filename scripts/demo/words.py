"""Pools of words for the demo dialogues: names, cities, favourites, numbers, and things the model knows nothing of."""

from __future__ import annotations


def words(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The words of ``text``; with a ``separator`` they may hold spaces."""
    return tuple(word.strip() for word in text.split(separator))


NAMES = words("""
    Ada Adam Adele Ahmed Aisha Akira Alan Albert Alex Alice Amara Amina Amir Amy Ana Andre Andrea Anna Anton Aria Arthur
    Astrid Ava Barbara Ben Bianca Boris Brian Bruno Carla Carlos Carmen Cecil Chen Chloe Clara Colin Cora Daisy Dan Dana
    Daniel David Diana Diego Dora Edith Edgar Elena Eli Elias Ella Ellen Emil Emily Emma Eric Erik Eva Evan Felix Fiona
    Flora Frank Frida Gabriel Gemma George Gina Grace Greta Gustav Hana Hannah Harry Hassan Hector Helen Henry Hugo Ian
    Ida Ines Ingrid Irene Iris Isaac Ivan Ivy Jack Jacob James Jane Jasmine Jean Jenny Joan John Jonas Jose Joseph Julia
    Jun Kai Karim Karl Kate Kenji Kim Kira Lara Laura Lea Leila Leo Leon Lena Li Liam Lily Lina Linda Lisa Lola Louis
    Lucas Lucia Lucy Luis Luna Maja Marco Maria Marie Mark Marta Martin Mary Mateo Max Maya Mei Mia Michael Mila Milo
    Mina Mira Mohammed Mona Nadia Naomi Nasir Nia Nick Nico Nina Noah Nora Nour Olga Oliver Olivia Omar Oscar Otto Pablo
    Pat Paul Paula Pedro Peter Petra Philip Pia Priya Quinn Rachel Raj Ravi Rita Robert Rosa Rose Ruby Ruth Sakura Sam
    Samir Sandra Sara Sarah Sasha Sergei Simon Sofia Sonia Stella Sven Tara Tess Theo Thomas Tim Tina Tom Tony Uma Vera
    Victor Viola Wei Wendy Will Xavier Yan Yara Yuki Yusuf Zara Zoe
""")
SYLLABLES = words("""
    ba be bi bo da de di do fa fe ga go ha he ja jo ka ke ki la le li lo lu ma me mi mo na ne ni no nu pa pe po ra re ri
    ro ru sa se si so ta te ti to va ve vi wa ya yo za ze
""")
NAME_ENDINGS = ("", "", "n", "r", "s", "l", "th", "m", "x", "k")
CITIES = words("""
    Amsterdam Athens Atlanta Austin Bangkok Barcelona Beijing Berlin Bern Bogota Boston Brussels Budapest Cairo Chicago
    Copenhagen Dakar Delhi Denver Dublin Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon
    London Lyon Madrid Manila Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Paris Prague Quito
    Riga Rome Seattle Seoul Shanghai Singapore Sofia Stockholm Sydney Tallinn Tokyo Toronto Turin Vienna Warsaw Zurich
""")
FAVOURITES: dict[str, tuple[str, ...]] = {
    "colour": words("red blue green yellow black white orange purple pink brown grey silver gold violet"),
    "food": words("pizza pasta rice soup bread cheese salad sushi curry cake noodles tacos pancakes honey"),
    "animal": words("cat dog horse owl fox bear tiger lion panda whale rabbit turtle eagle wolf dolphin"),
    "season": words("spring summer autumn winter"),
    "sport": words("football tennis chess running swimming rowing hockey cycling climbing dancing golf judo"),
}
NUMBERS = words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
""")
COUNTED = words("apples books coins eggs pens stones cards cups balls oranges cookies stamps")
OFF_TOPIC_THINGS = words(
    """
    France|Japan|Brazil|Italy|Kenya|the moon|the sun|Hamlet|a bicycle|a volcano|the internet|chocolate|the stock market|
    a black hole|football|the Olympic Games|photosynthesis|a car|gold|the French Revolution|democracy|bread|a piano|
    physics|climate change|an elephant|the ocean|chess|music|history|a good book|tea|the world cup|a rainbow|Mars|
    Python generators|a dragon|winter|the news|love letters|Einstein|soup|airplanes|dinosaurs|the weather|Spain|rice|
    a lighthouse|Shakespeare|the brain|gravity|poetry|a vaccine|London|Canada|coffee|magnets|robots|cheese|the Nile|
    taxes|a mortgage|the heart|cats|dogs|spiders|basketball|the violin|glass|salt|the Roman Empire|Napoleon|rockets
    """,
    "|",
)
