"""Languages by the first article of the Universal Declaration of Human Rights, and by everyday sentences."""

import pytest

from fdl.evaluators.languages import KNOWN, detect

TEXTS = {
    "ar": ["يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.", "أين يقع أقرب مطعم إلى الفندق؟", "شكرا جزيلا"],
    "bg": ["Всички хора се раждат свободни и равни по достойнство и права.", "Това е много добра книга за деца."],
    "bn": ["সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।"],
    "de": [
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
        "Der kleine Hund schläft unter dem Tisch.",
    ],
    "el": ["Όλοι οι άνθρωποι γεννιούνται ελεύθεροι."],
    "en": [
        "All human beings are born free and equal in dignity and rights.",
        "The dog sleeps under the table because it is tired.",
        "WHAT IS THE CAPITAL OF FRANCE?",
        "hello",
    ],
    "es": ["Todos los seres humanos nacen libres e iguales en dignidad y derechos.", "El perro duerme bajo la mesa."],
    "fa": ["تمام افراد بشر آزاد به دنیا می آیند و از لحاظ حیثیت و حقوق با هم برابرند.", "این کتاب برای کودکان است."],
    "fi": ["Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.", "Koira on pöydän alla."],
    "fr": ["Tous les êtres humains naissent libres et égaux en dignité et en droits.", "Le chien dort sous la table."],
    "gu": ["બધા માનવો જન્મથી સ્વતંત્ર છે."],
    "he": ["כל בני האדם נולדו בני חורין."],
    "hi": ["सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।", "यह किताब बच्चों के लिए है।"],
    "it": [
        "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
        "Il cane dorme sotto il tavolo.",
    ],
    "ja": ["すべての人間は、生れながらにして自由である。"],
    "kn": ["ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ."],
    "ko": ["모든 인간은 태어날 때부터 자유롭다."],
    "ml": ["മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടെ ജനിച്ചിട്ടുള്ളവരാണ്."],
    "mr": ["सर्व मानवी व्यक्ति जन्मतःच स्वतंत्र आहेत व त्यांना समान प्रतिष्ठा आहे.", "हे पुस्तक मुलांसाठी आहे."],
    "ne": ["सबै व्यक्तिहरू जन्मजात स्वतन्त्र हुन् र तिनीहरूको समान अधिकार छ।", "यो किताब केटाकेटीको लागि हो।"],
    "nl": ["Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.", "De hond slaapt onder het bed."],
    "pa": ["ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ।"],
    "pt": ["Todos os seres humanos nascem livres e iguais em dignidade e em direitos.", "O livro não é para crianças."],
    "ru": [
        "Все люди рождаются свободными и равными в своем достоинстве и правах.",
        "Это очень хорошая книга для детей.",
    ],
    "sw": ["Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.", "Kitabu hiki ni cha watoto."],
    "ta": ["மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்."],
    "te": ["ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులు."],
    "th": ["มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน"],
    "uk": ["Всі люди народжуються вільними і рівними у своїй гідності та правах.", "Це дуже добра книга для дітей."],
    "ur": ["تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔", "یہ کتاب بچوں کے لیے ہے۔"],
    "vi": [
        "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
        "Con chó ngủ dưới bàn của tôi.",
    ],
    "zh": ["人人生而自由，在尊严和权利上一律平等。"],
}


def test_every_language_that_is_known_is_tried():
    assert set(TEXTS) == KNOWN


@pytest.mark.parametrize("language", TEXTS)
def test_language(language):
    assert [detect(text) for text in TEXTS[language]] == [language] * len(TEXTS[language])


def test_foreign_names_do_not_decide():
    assert detect("रवि Python और PyTorch से काम करता है।") == "hi"
    assert detect("The word मनुष्य is Hindi.") == "en"


def test_without_letters_there_is_no_language():
    assert detect("1 + 1 = 2!") is None
    assert detect("") is None
