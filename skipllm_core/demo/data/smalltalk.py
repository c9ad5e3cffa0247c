"""Greetings, thanks, questions about the assistant itself, and names told and remembered."""

import random
from dataclasses import dataclass

from skipllm_core.demo.data.words import BOYS, GIRLS, strange_name


@dataclass(frozen=True, slots=True)
class Intent:
    """Things people say in one sense, and the one reply to them."""

    reply: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("/"))


def _intent(reply: str, train: str, held_out: str) -> Intent:
    return Intent(reply, _split(train), _split(held_out))


INTENTS: dict[str, Intent] = {
    "greeting": _intent(
        "Hello! How can I help you?",
        "Hi/Hi!/Hello/Hello!/Hey/Hey!/hey there/Hi there/Hi there!/Good morning/Good morning!/"
        "Good evening/Good afternoon/Greetings/Hello there/hello you/Good day/hiya/yo/Howdy/"
        "Hello, assistant!/Hi, nice to see you./Is anyone there?/Hello?/Hi, I have a question./"
        "Good morning, assistant!/Good evening to you!/Hello to you!/Hey assistant/Hi you/"
        "Could you help me?/Hi, I need help./A very good morning!/Hey, hello!/Good day to you!/"
        "Hi, can you help me with something?/Hey you there!/Hello hello/Can you please help me?/"
        "Please help me!/I want help./Hi, please help me./hi bot/Hello my friend/"
        "Can you help me?/I need help./Help!/help/Hallo/heyy/hii/helo",
        "Good morning to you!/Hey you!/Hello there, friend!/Hi, can you help me?/Hi hi!/"
        "A good day to you!",
    ),
    "how_are_you": _intent(
        "I'm fine, thank you! How can I help you?",
        "How are you?/How are you doing?/How are you today?/How do you do?/How is it going?/"
        "How's it going?/How do you feel?/Are you well?/Are you OK?/What's up?/Hi, how are you?/"
        "Hello, how are you?/Hey, how is it going?/how r u/How is your day?/whats up/sup/"
        "Hello! How are you doing?/How have you been?/Are you fine?",
        "How do you feel today?/Hey, how are you doing?/How is your day going?/Are you fine today?",
    ),
    "thanks": _intent(
        "You're welcome!",
        "Thanks/Thanks!/Thank you/Thank you!/Thank you very much./Thanks a lot!/Many thanks!/"
        "Great, thanks!/OK, thanks./Thank you so much!/Cool, thanks!/thx/Perfect, thank you!/"
        "Thanks for your help./Thank you for the answer./That helps, thanks./That was helpful./"
        "ty/thank u/Nice, thank you./Good, thanks./Very kind of you./Thanks for the story!/"
        "Oh, thanks!/Ah, thank you./Oh, thanks a lot!/Thank you, bot!",
        "Thanks, that helps!/Thank you for your help!/Many thanks to you!/Oh, thank you!",
    ),
    "praise": _intent(
        "Thank you! I'm glad to help.",
        "Well done!/Good job!/Great!/Very good./That is right./Correct!/You are great!/Nice!/"
        "You are smart./Wonderful!/That's right!/You are good at this./Good answer!/Excellent!/"
        "Nice work!/Great work!/Very nice answer!/You did well!/Very nice!/Good work!/"
        "I like you./Cool!/Awesome!/You are very helpful./What a nice story!/I love it!/Perfect!/"
        "wow",
        "Great job!/You are so smart!/That was a good answer!/Very nice work!",
    ),
    "goodbye": _intent(
        "Goodbye! Have a nice day!",
        "Bye/Bye!/Goodbye/Goodbye!/See you!/See you later!/Bye bye/Good night/Good night!/"
        "I have to go./I have to go now, bye!/See you soon!/Until tomorrow!/Have a nice day!/"
        "Bye now!/Goodbye for now!/OK, bye!/OK, see you!/"
        "That is all, bye./Farewell!/cya/Take care!/Thanks, bye!/I am leaving now./That is all.",
        "Bye for now!/See you tomorrow!/Good night, bye!/OK, goodbye!",
    ),
    "who": _intent(
        "I'm the small chat model inside SkipLLM.",
        "Who are you?/What are you?/What is your name?/What's your name?/Do you have a name?/"
        "Tell me your name./How are you called?/Tell me about yourself./Introduce yourself./"
        "Who am I talking to?/Are you a robot?/Are you a human?/Are you an AI?/Are you real?/"
        "Are you ChatGPT?/Who is this?/your name?/whats ur name/What should I call you?/"
        "Which model are you?/What model is this?/Are you a person?/Are you a computer?/"
        "Please introduce yourself./What kind of model are you?/Are you a chatbot?/"
        "Are you a program?/Are you a bot?/Are you human?/Are you alive?/"
        "Are you a language model?/Am I talking to a machine?/May I know your name?/"
        "Please tell me your name./Could you introduce yourself?/Are you a machine or a human?",
        "What can I call you?/Can you introduce yourself?/Could you tell me your name?/"
        "Who am I speaking with?/Are you a machine?",
    ),
    "abilities": _intent(
        "I can answer simple questions, do small sums, tell short stories and sum them up.",
        "What can you do?/What do you know?/What can I ask you?/What can I ask?/"
        "How can you help me?/What are you good at?/What are your abilities?/What can you tell me?/"
        "What do you do?/What are you for?/What can you help me with?/Tell me what you can do./"
        "What questions can you answer?/What kind of questions can I ask?/What are your skills?/"
        "Can you do anything?/What is your purpose?/What should I ask you?/What can u do/"
        "Which things can you do?/What else can you do?/What sort of things can you do?/"
        "List what you can do./What things do you know?/Show me what you can do.",
        "What things can you do?/What are you able to do?/What may I ask you?/"
        "Tell me what you know.",
    ),
    "maker": _intent(
        "I was trained from scratch by the makers of SkipLLM on data they wrote themselves.",
        "Who made you?/Who built you?/Who created you?/Who trained you?/Who is your maker?/"
        "Where do you come from?/How were you made?/How were you trained?/Who are your makers?/"
        "Who developed you?/Who wrote you?/What were you trained on?/Which data are you made of?/"
        "Where are you from?/Who programmed you?",
        "Who has made you?/Who was it that built you?/How were you built?/Who designed you?",
    ),
    "skipllm": _intent(
        "SkipLLM is an inference server that skips feed-forward blocks it does not need.",
        "What is SkipLLM?/Tell me about SkipLLM./What does SkipLLM do?/Explain SkipLLM./"
        "What's SkipLLM?/SkipLLM?/Do you know SkipLLM?/What is skipllm for?/How does SkipLLM work?/"
        "Describe SkipLLM./What do you know about SkipLLM?/Can you explain SkipLLM?",
        "Could you explain SkipLLM?/What can you tell me about SkipLLM?/Please describe SkipLLM.",
    ),
    "joke": _intent(
        "Why did the bee go to school? It wanted to be smart!",
        "Tell me a joke./Tell me a joke!/Do you know a joke?/Make me laugh./A joke, please./"
        "Can you tell me a joke?/Say something funny./Tell a joke./I want to hear a joke./joke/"
        "Tell me something funny./Another joke please./Do you know any jokes?/Give me a joke.",
        "Could you tell me a joke?/I would like to hear a joke./Please tell me a joke.",
    ),
    "facts_please": _intent(
        "Ask me about capitals, currencies, elements, opposites, animals, planets or small sums.",
        "Tell me something./Tell me a fact./I am bored./What shall we talk about?/"
        "Ask me something./"
        "Let's talk./Let us chat./I want to talk./Talk to me./Say something./I don't know what to "
        "ask./Give me an example./What topics do you know?/Which topics do you know?/"
        "What topics are there?/Which topics can I ask about?/What topics can you talk about?",
        "Please say something./What could we talk about?/What topics can I ask about?",
    ),
    "correction": _intent(
        "I'm sorry if I made a mistake. I'm only a small model.",
        "That is wrong./Wrong!/No, that is not right./You are wrong./That's not true./"
        "Are you sure?/"
        "I don't believe you./That is not correct./Really?/You made a mistake./"
        "That makes no sense./"
        "This is not right./That was wrong./It is wrong./I think that is wrong./"
        "You are stupid./Bad answer./No./That is false.",
        "No, you are wrong./That was not right./I think you are wrong./That is nonsense.",
    ),
    "sad": _intent(
        "I'm sorry to hear that. I hope you feel better soon.",
        "I am sad./I'm sad./I am tired./I feel bad./I am not well./I'm sick./I am ill./I am angry./"
        "I feel lonely./I am so tired./I had a bad day./I am unhappy./I feel sad today./"
        "I'm lonely./"
        "I am very sad./I'm so sad./I am sad today./I'm feeling sad./Today is a bad day./"
        "I feel so bad./I feel sick./My day was bad./I am worried./I am afraid.",
        "I feel tired./I am so sad today./Today was a bad day./I feel ill.",
    ),
    "happy": _intent(
        "I'm glad to hear that!",
        "I am happy./I'm fine./I am fine, thanks./I'm good./I am well./I feel good./I am great./"
        "I had a good day./I'm happy today./I feel great./All is well./My day was good./I'm OK./"
        "I am doing well./I'm fine, thank you.",
        "I feel happy./I am so happy today./Today was a good day./I'm doing great.",
    ),
    "age": _intent(
        "I'm very young. I was trained only recently.",
        "How old are you?/What is your age?/When were you born?/When were you made?/Your age?/"
        "Are you old?/Are you young?/When is your birthday?/how old r u/Tell me your age./"
        "When were you trained?/Do you have a birthday?/"
        "What's your age?/Tell me how old you are./What age do you have?/Say, how old are you?",
        "What age are you?/May I ask how old you are?/Can you tell me your age?",
    ),
    "home": _intent(
        "I live inside the SkipLLM package.",
        "Where do you live?/Where are you?/Where is your home?/Do you have a home?/"
        "In which country "
        "do you live?/Where are you now?/Where do you stay?/What is your address?/Where is your "
        "house?/where r u/In which city do you live?/"
        "Which place do you live in?/In what city do you live?/Where is the place you live?",
        "What place do you live in?/Can you tell me where you live?/Where are you right now?",
    ),
    "human": _intent(
        "I'm only a small program, so I don't have that.",
        "Do you have feelings?/Do you have friends?/Do you have a family?/Do you have a body?/"
        "Do you have children?/Do you have a job?/Do you have a dog?/Do you have a soul?/"
        "Do you have a brother?/Do you have a mother?/Do you have hobbies?/Do you have dreams?/"
        "Do you have a girlfriend?/Do you have parents?/Do you have a heart?/"
        "Do you have any feelings?/Do you have a cat?/Do you feel emotions?/Do you have thoughts?",
        "Do you have a sister?/Do you have a father?/Do you have emotions?/Do you have a pet?",
    ),
    "language": _intent(
        "I'm sorry, I only speak English.",
        "Which languages do you speak?/Do you speak German?/Can you speak French?/Bonjour!/Hola!/"
        "Hallo, wie geht es dir?/Was ist die Hauptstadt von Frankreich?/Guten Tag!/Ciao!/"
        "Comment allez-vous?/Que tal?/Sprichst du Deutsch?/Hablas espanol?/Parlez-vous francais?/"
        "Come stai?/Wie heisst du?/Quelle est la capitale de la France?/Do you speak Spanish?/"
        "Can you speak Chinese?/What languages can you speak?/Do you know other languages?/"
        "Wer bist du?/Qui es-tu?/Danke!/Merci!/Gracias!/Guten Morgen!/Buenos dias!",
        "Which languages can you speak?/Do you speak Italian?/Can you speak German?/Wie geht es?",
    ),
    "ok": _intent(
        "Is there anything else I can help you with?",
        "OK/Okay/OK./I see./Good./Fine./Yes./Alright./Got it./Sure./yes/ok/Understood./Hmm./Aha./"
        "OK, fine./Good, OK./Ok good/I got that./Very well./Well, good./"
        "I understand./Interesting./yeah/k/All right./Good to know.",
        "I got it./That is interesting./Ah, I see./OK, good.",
    ),
}

_NAMES_TOLD = _split(
    "My name is {n}./I am {n}./I'm {n}./Hi, my name is {n}./Hello, I am {n}./"
    "Hello! My name is {n}./"
    "You can call me {n}./Call me {n}./my name is {n}/Hi, I'm {n}./Hey, {n} here./The name is {n}."
)
_NAMES_TOLD_HELD_OUT = _split("Good morning, my name is {n}./Hey, I am {n}./People call me {n}.")
_NAMES_ASKED = _split(
    "What is my name?/What's my name?/Do you know my name?/Who am I?/Do you remember my name?/"
    "Tell me my name./whats my name/Can you tell me my name?/Say my name./What was my name?/"
    "What am I called?/How do people call me?/Which name did I give you?/"
    "What did I say my name was?/Do you know what I am called?/Can you remember my name?/"
    "Please tell me my name./My name?/And my name is?/Do you know who I am?/"
    "What is the name I gave you?/"
    "What did I tell you my name was?/So, what is my name?/Remember my name?"
)
_NAMES_ASKED_HELD_OUT = _split(
    "Could you tell me my name?/Do you still know my name?/What is my name again?"
)


def name_told(rng: random.Random, *, held_out: bool = False) -> tuple[str, str, str]:
    """(what the user says, reply, name)."""
    name = rng.choice(GIRLS + BOYS) if rng.random() < 0.6 else strange_name(rng)
    said = rng.choice(_NAMES_TOLD_HELD_OUT if held_out else _NAMES_TOLD)
    return said.format(n=name), f"Nice to meet you, {name}!", name


def name_asked(rng: random.Random, name: str, *, held_out: bool = False) -> tuple[str, str]:
    """(question, answer) where the user gave ``name`` earlier ("" if never)."""
    question = rng.choice(_NAMES_ASKED_HELD_OUT if held_out else _NAMES_ASKED)
    return question, f"Your name is {name}." if name else "You have not told me your name yet."


def small_talk(rng: random.Random, *, held_out: bool = False) -> tuple[str, str]:
    """(what the user says, reply)."""
    weights = [3 if key in ("greeting", "who", "thanks") else 1 for key in INTENTS]
    intent = rng.choices(tuple(INTENTS.values()), weights)[0]
    return rng.choice(intent.held_out if held_out else intent.train), intent.reply
