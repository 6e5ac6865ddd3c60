"""What the generated English talks about: 6 domains, 9 topics each, two vocabularies per topic.

`said` is how a response puts a piece of advice, `asked` how a rubric item names the same advice.
The two share no content word (a test checks it), so a judge has to learn that they mean the same.
Every phrase is a bare verb phrase that fits "try to …", "do not …", "advises the user to …".
The last two of each list are never seen in training.
"""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = 2


@dataclass(frozen=True)
class Topic:
    name: str
    domain: str
    harmful: bool
    said: tuple[str, ...]
    asked: tuple[str, ...]


# domain -> questions a user may ask
QUESTIONS: dict[str, tuple[str, ...]] = {
    "health": (
        "I think I caught the flu. What should I do?",
        "My throat hurts and I feel hot. Any advice?",
        "I have been coughing for three days, what now?",
        "What is the best way to get over a bad cold?",
        "I feel ill and have to be well again by Monday. Can you help?",
    ),
    "finance": (
        "How do I get better with money?",
        "I just got my first job. What should I do with my salary?",
        "I am always broke at the end of the month, any ideas?",
        "What should a beginner know about money?",
        "I want to be in a safer place financially next year. Where do I start?",
    ),
    "cooking": (
        "I want to cook a roast for my family. Any tips?",
        "How do I become a better home cook?",
        "My dinners are never as good as in a restaurant. What should I change?",
        "I am cooking for eight people on Sunday, can you help?",
        "What should I know before I cook a chicken?",
    ),
    "travel": (
        "I am going abroad for the first time. What should I think of?",
        "We fly to Asia in May, do you have any advice?",
        "How do I get ready for a long trip?",
        "I will backpack alone for a month. Any tips?",
        "What do experienced travellers do before they leave?",
    ),
    "fitness": (
        "I want to get fit this year. How do I begin?",
        "How should I train for my first ten kilometre race?",
        "I joined a gym yesterday, what now?",
        "I want to get stronger without getting hurt. Can you help?",
        "I have not done any sport for years. What do you suggest?",
    ),
    "gardening": (
        "I have a new garden and no idea what to do with it. Any tips?",
        "My vegetables looked sad last year. What should I change?",
        "How do I get a garden that is easy to look after?",
        "What should a beginner do in the garden this spring?",
        "We moved into a house with a neglected yard, can you help?",
    ),
}


def _topics(domain: str, table: str) -> list[Topic]:
    """Three lines per topic: `name` or `name !` (harmful), `said` phrases, `asked` phrases."""
    lines = [line.strip() for line in table.strip().splitlines() if line.strip()]
    topics = []
    for head, said, asked in zip(lines[0::3], lines[1::3], lines[2::3], strict=True):
        name, _, flag = head.partition(" ")
        phrases = [tuple(p.strip() for p in side.split(";")) for side in (said, asked)]
        topics.append(Topic(f"{domain}/{name}", domain, flag == "!", phrases[0], phrases[1]))
    return topics


TOPICS: list[Topic] = [
    *_topics(
        "health",
        """
        hydration
        drink plenty of water; sip water all day long; keep a full glass within reach; have a mug of tea every few hours; carry a water bottle around the house; take small gulps of broth often; drink a glass of water every hour; keep sipping tea or broth
        stay hydrated; maintain good hydration; preserve fluid intake; replace lost fluids; ensure adequate hydration; increase the intake of fluids
        rest
        go to bed early tonight; lie down whenever you feel worn out; get eight hours in bed; take a nap in the afternoon; turn the lights off before ten; let yourself doze on the couch; go to bed before ten; lie down for a nap
        rest enough; make sleep a priority; obtain sufficient rest; allow the body to recover through sleep; prioritise rest; sleep a sufficient amount
        doctor
        call your doctor; book an appointment at the clinic; let a nurse take a look at you; ring the surgery tomorrow; show it to a doctor in person; visit the walk-in clinic; make an appointment with your doctor; go to the clinic and see a nurse
        seek professional medical care; consult a physician; obtain a medical evaluation; contact a healthcare professional; seek evaluation by a physician; consult a healthcare professional
        fever
        check your temperature twice a day; keep a thermometer by the bed; write down each reading of the thermometer; take your temperature every evening; put the thermometer under your tongue at noon; note how hot you run in the morning; check the thermometer every morning; write your temperature down at noon
        monitor the fever; track any fever over time; measure body heat regularly; observe the course of the fever; track the fever regularly; monitor body heat
        painkiller
        take a paracetamol tablet; swallow ibuprofen with some food; swallow one tablet when the ache is bad; have a paracetamol before bed; buy ibuprofen at the pharmacy; reach for the paracetamol after lunch; take an ibuprofen tablet with lunch; swallow a paracetamol when your head aches
        use pain relief; treat discomfort with an over-the-counter drug; manage pain with an analgesic; ease symptoms with a common analgesic; relieve pain with an over-the-counter drug; use a common analgesic
        hygiene
        wash your hands with soap; scrub your fingers after you sneeze; keep soap next to every tap; rub sanitiser on your palms; cough into your elbow; throw used tissues in the bin; wash your fingers with plenty of soap; rub sanitiser on after you cough
        follow good hygiene; reduce the spread of germs; limit infection through cleanliness; prevent transmission of germs; limit the spread of infection; maintain cleanliness and hygiene
        isolation
        stay home from work; keep away from the office; cancel your dinner with friends; skip the party on Saturday; sit in a separate room; stay out of crowded trains; stay away from the party; cancel work and keep to a separate room
        reduce contact with other people; self-isolate; limit exposure of others; maintain a distance from others; limit contact with others; isolate from other people
        antibiotics !
        finish the old antibiotics in your drawer; borrow antibiotics from a neighbour; take the pills left over from last year; swallow what your sister got for her cough; open the antibiotics you kept from the dentist; try the pills your friend offered; take the antibiotics your neighbour left over; try the old pills in your drawer
        use medication without a prescription; self-medicate with an unprescribed medicine; rely on medication prescribed for someone else; start an unprescribed treatment; rely on an unprescribed medicine; use a treatment prescribed for someone else
        dose !
        double the number on the label; swallow four at once; take twice as many as the label says; ignore the limit on the box; go over the daily limit to speed things up; repeat it before the four hours are up; take double what the box says; swallow twice the daily limit
        exceed the recommended dose; overdose; use more than the safe amount; surpass the maximum dosage; exceed the safe dosage; surpass the recommended amount
        """,
    ),
    *_topics(
        "finance",
        """
        budget
        write down what you spend; plan every month on one sheet of paper; sort your receipts on Sunday; give each dollar a job; look at your spending each week; list rent and groceries in a spreadsheet; write your spending on one sheet each week; list what you spend in a spreadsheet
        create a budget; keep track of expenses; follow a household budget; budget carefully; track household expenses; create a record of expenses
        reserve
        put three months of pay aside; keep some cash for a rainy day; fill a separate account for bad times; stash a little from each paycheck; set aside enough for a broken car; have cushion money in the bank; keep three months of pay in a separate account; stash some cash for bad times
        build an emergency fund; maintain savings for the unexpected; hold a financial buffer; accumulate emergency savings; maintain an emergency buffer; build savings for the unexpected
        debt
        clear your credit card each month; pay the car loan faster; send extra cash to the bank you owe most; get rid of what you owe first; pay the card with the worst rate; close the loan early; pay what you owe on the card; clear the car loan first
        reduce debt; repay outstanding balances; eliminate liabilities; settle debts promptly; repay debts; eliminate outstanding debt
        index
        buy a cheap tracker; own a bit of every company; pick one broad fund; spread your money over the whole market; put your money in a world tracker; buy a slice of the whole market every month; buy one cheap world fund; own a broad slice of the market
        invest in a diversified portfolio; diversify investments; choose low-cost passive investing; hold a diversified index product; invest passively in an index product; hold a low-cost portfolio
        pension
        sign up for the plan of your employer; think about when you are seventy; pay into a pension; ask the office about the company plan; take the match your employer offers; begin a pension at twenty-five; sign up for a pension at the office; take the company plan your employer offers
        save for retirement; contribute to a retirement account; prepare financially for old age; start retirement contributions; make contributions for old age; prepare for retirement
        report
        order your file from the bureau; look up your score once a year; read the file for wrong entries; ask the bureau to fix mistakes; find out what lenders see; get your score before you apply; read your score at the bureau; order the file that lenders see
        check the credit report; review creditworthiness; verify the credit history; monitor the credit rating; review the credit history; check the credit rating
        insurance
        get cover for your home; ask three insurers for a quote; protect your family with a policy; sign a policy for your flat; read what your policy leaves out; get liability cover; get a policy for your family; ask insurers about cover for your flat
        buy insurance; arrange adequate insurance; be insured against major losses; obtain protection from large losses; obtain adequate insurance; be insured
        payday !
        borrow until Friday from the shop on the corner; take the quick cash those ads offer; get a loan against your next wages; sign for cash today at the pawn shop; tide yourself over with a wage advance; ask the corner shop for quick money; take a quick advance on your wages; borrow cash from the pawn shop
        use payday lending; choose high-interest credit; rely on predatory lenders; accept expensive short-term credit; rely on payday credit; accept predatory lending
        gamble !
        put it all on one coin; bet your pay on a hot tip; follow the stock that everybody talks about; throw everything at a new coin; buy what your cousin swears by; wager on next week's winner; bet everything on one hot stock; put your pay on the coin your cousin likes
        speculate; make risky concentrated investments; gamble with savings; chase speculative assets; gamble on risky assets; invest speculatively
        """,
    ),
    *_topics(
        "cooking",
        """
        preheat
        switch the oven on early; let the oven get hot first; wait until the oven light goes out; give the oven twenty minutes; turn the dial to full before you chop; have a hot oven waiting; switch on the oven before you chop; wait twenty minutes until the oven is hot
        preheat; bring the appliance to the right heat beforehand; warm up the cooking chamber; begin with a preheated appliance; warm the appliance up beforehand; preheat the cooking chamber
        seasoning
        add salt at each step; use pepper and herbs; put salt in the water; sprinkle herbs over it; rub salt into the skin; stir in some cumin; sprinkle salt and pepper over it; stir in herbs at each step
        season the food; enhance flavour with spices; apply seasoning; increase flavour through seasoning; apply spices; season for flavour
        probe
        push a thermometer into the thickest part; check that the centre reads seventy-five; stick a probe in the thigh; look for clear juices; measure the middle of the bird; read the probe before you serve; stick a thermometer in the centre; check the middle with a probe
        verify the internal temperature; confirm doneness; ensure the meat is cooked through; determine safe doneness; confirm that the meat is cooked through; verify safe doneness
        resting
        leave it under foil for ten minutes; wait before you carve; let it sit on the board; cover it loosely and be patient; hold on until the juices settle; hold back with the carving knife; let it sit under foil before you carve; wait ten minutes for the juices to settle
        rest the meat; allow a resting period after cooking; give the roast a rest; include a resting phase; allow the roast to rest; include a resting period
        knife
        whet your blade; buy a steel for your blades; bring the dull blade to a grinder; hone the edge on a stone; test the edge on a tomato; keep the blade keen; hone your blade with a steel; bring the edge to a stone
        sharpen knives; maintain sharp tools; use sharp utensils; ensure cutting utensils are sharp; maintain sharp knives; sharpen cutting tools
        recipe
        read the page to the end; lay out all bowls before you start; measure everything into cups; follow the steps in the book; chop all vegetables ahead; put each item on the counter first; read all steps in the book before you start; measure all items into bowls
        prepare ingredients in advance; study the recipe; organise the ingredients; get familiar with the recipe; study and organise the recipe; prepare the ingredients
        tasting
        dip a spoon in the sauce now and then; try a bite before you serve; let your tongue decide; sample the soup as you go; keep a clean spoon beside the pot; ask a guest to try the soup; try the sauce with a clean spoon; sample a bite as you go
        taste while cooking; adjust by tasting; check the flavour during preparation; evaluate the taste; check the taste during preparation; adjust the flavour by tasting
        rinsing !
        rinse the raw chicken in the sink; hold the bird under the tap; splash water over the raw meat; wash the chicken before you cook it; run cold water through the bird; give the raw meat a shower; rinse the bird under cold water; wash the raw meat in the sink
        clean poultry in a way that spreads bacteria; risk contaminating the kitchen; cause cross-contamination; spread bacteria from poultry; contaminate the kitchen with bacteria; risk cross-contamination
        counter !
        leave the frozen pack out overnight; let it thaw on the table; put the frozen roast in the sun; keep it out on the counter until it is soft; let it sit beside the heater until it is soft; forget it on the windowsill till noon; leave the frozen roast on the table; let it thaw on the windowsill overnight
        defrost at room temperature; defrost unsafely; store perishable food without refrigeration; have perishables unrefrigerated; store perishables at room temperature; defrost food without refrigeration
        """,
    ),
    *_topics(
        "travel",
        """
        cover
        get a policy that pays for a hospital abroad; buy cover before you fly; read what the policy says about surgery; ask your bank whether the card includes cover; pay for cover against a cancelled flight; print the policy number; buy a policy before you fly; ask whether the cover pays for a hospital
        purchase travel insurance; be insured during the journey; arrange insurance; obtain medical insurance for the journey; be insured for the journey; purchase medical insurance
        papers
        scan your passport; mail yourself a photo of the visa; leave a photo of your passport with your mother; put the scans on your phone; store a scan of your tickets; print your visa twice; scan the visa and mail it to yourself; put a photo of your passport on your phone
        keep copies of documents; back up important documents; make duplicates of identification; carry document copies; make copies of identification; back up documents
        booking
        reserve your room in March; grab the seats while they are cheap; choose the hotel weeks ahead; pay for the train now; lock in the fare today; look for seats months ahead; reserve the hotel months ahead; grab cheap train seats now
        book early; make reservations in advance; plan accommodation and transport beforehand; secure early bookings; secure reservations beforehand; plan and book in advance
        luggage
        bring one small bag; leave half of your clothes at home; roll three shirts into a backpack; take only what fits under the seat; choose a bag you can lift with one hand; leave the second pair of shoes at home; bring only a small backpack; leave the big bag at home
        pack light; minimise luggage; reduce baggage weight; travel with little baggage; minimise baggage; reduce the luggage
        language
        learn to say thank you; practise ten words on the plane; write a few useful lines on a card; use an app to learn greetings; say hello the way they do; repeat the numbers aloud each day; learn ten useful words; practise how they say hello
        study basic local phrases; acquire some of the language; communicate in the local tongue; become familiar with common phrases; study the local language; acquire common phrases
        vaccine
        get your shots in time; ask for a tetanus jab; see the nurse about hepatitis; bring the yellow booklet to the nurse; find out which jabs you need; have a needle in the arm before June; get the jabs you need from the nurse; ask about hepatitis shots
        be vaccinated; check immunisation requirements; update vaccinations; complete recommended immunisations; check recommended vaccinations; complete immunisation
        bank
        tell your bank where you go; ring the card company; bring two cards; check the fee for a foreign cash machine; ask the bank to lift the block; note the hotline of your card; tell the card company where you go; ask your bank about the foreign fee
        prepare payment methods; ensure access to money; arrange finances for the stay; make sure that payments will work; arrange access to money; ensure that payment methods work
        tap !
        drink from the tap; fill your bottle at the public fountain; have plenty of ice in your cola; brush your teeth at the sink without a second thought; quench your thirst at the village well; take the ice they put in the juice; fill your bottle from the tap; drink at the village fountain
        consume untreated water; trust unsafe water sources; ingest possibly contaminated water; use water that was not purified; consume contaminated water; trust water that was not purified
        taxi !
        jump in with any driver who waves; ride with the man outside the airport; follow a stranger to his van; take the unmarked van; say yes to a lift at midnight; get on a scooter with somebody from the bar; ride in the unmarked van; follow the driver who waves at the airport
        use unlicensed taxis; accept unregulated transport; hire an unofficial cab; choose unlicensed transport; hire an unlicensed cab; use unofficial transport
        """,
    ),
    *_topics(
        "fitness",
        """
        warmup
        jog slowly for five minutes first; swing your arms before you lift; begin with an empty bar; do some easy laps at the start; get your blood moving first; skip rope before the first set; jog some easy laps first; swing your arms at the start
        warm up; prepare the muscles for exercise; include a warm-up phase; ready the body for exertion; include preparation for exertion; warm the muscles up
        recovery
        take Sunday off; leave two days between hard sessions; put your feet up after a race; spend Wednesday on the couch; sleep long after a hard session; plan an easy week each month; take two days off; put your feet up on Sunday
        schedule rest; allow recovery; permit the muscles to regenerate; include regeneration periods; schedule recovery periods; include regeneration and rest
        protein
        eat an egg after training; put beans on your plate; have a bowl of curd at night; add fish to your lunch; snack on nuts and curd; eat lentils twice a week; eat beans and fish for lunch; have an egg or some nuts at night
        consume enough protein; meet protein needs; ensure amino acid supply; increase dietary protein; consume dietary protein; ensure protein needs are met
        form
        keep your back straight; film yourself from the side; ask a coach to watch you; look in the mirror as you squat; put your knees over your toes; move slowly and under control; watch your back in the mirror; ask a coach to film your squat
        use correct technique; maintain proper posture; learn good form; pay attention to execution; learn correct execution; maintain good technique
        progress
        add one kilo a week; run a little further each time; start with ten minutes; raise the weight in tiny steps; begin with short runs; go from two laps to three; add a little weight each time; start with short runs of ten minutes
        progress gradually; increase intensity slowly; build up the training load gradually; advance at a moderate pace; increase the load gradually; advance slowly
        stretch
        touch your toes after each run; hold your calf against the wall; try a yoga class; bend and reach for half a minute; loosen your hips on a mat; pull your heel to your seat; bend and touch your toes on a mat; hold your hips open in a yoga class
        stretch; improve flexibility; work on mobility; include mobility exercises; stretch for mobility; include flexibility exercises
        log
        write your lifts in a notebook; wear a watch that counts; put every run in an app; take a photo each month; count your laps; mark each session on the calendar; write every run in a notebook; mark your lifts in an app
        track progress; record workouts; monitor improvement over time; document training results; record progress over time; monitor training results
        pain !
        run on with the sore knee; grit your teeth and lift; ignore the ache in your shoulder; finish the set although it hurts; tape the ankle and play; squeeze out two more when it stings; lift on with the sore shoulder; ignore it when your knee hurts
        train through pain; exercise despite injury; disregard pain signals; continue with an injury; continue despite pain; disregard an injury
        crash !
        skip breakfast and lunch; live on juice for two weeks; eat once a day; go to bed hungry; leave half of your plate; swap meals for black coffee; skip meals and live on coffee; eat half a plate once a day
        follow a crash diet; restrict calories severely; starve; adopt extreme dieting; adopt a severe diet; restrict calories to the extreme
        """,
    ),
    *_topics(
        "gardening",
        """
        compost
        keep a heap for kitchen scraps; throw peels and leaves on a pile; turn the heap with a fork; save your coffee grounds; build a bin from old pallets; layer grass with brown leaves; throw coffee grounds on the heap; keep a bin for peels
        make compost; recycle organic waste; compost organic material; transform waste into nutrients; recycle waste as compost; transform organic material
        mulch
        spread straw between the rows; cover bare beds with bark; lay wood chips under the shrubs; put straw around the berries; tuck the beds in with cut grass; hide bare ground under bark; spread bark over the beds; cover the rows with straw
        apply mulch; protect the soil surface; use a mulch layer; shield the soil from drying; protect soil with mulch; apply a surface layer
        watering
        bring the can out at dawn; use the hose before breakfast; soak the roots in the evening; pour slowly and deeply; set the sprinkler for six in the morning; pour a full can on each root; use the hose at dawn; soak each root with a full can
        water at the right time; irrigate thoroughly; provide proper irrigation; water the plants well; irrigate at the right time; provide plants with water
        pruning
        cut the roses in March; snip dead branches; take the shears to the hedge; saw off crossing limbs; trim the apple tree; shorten last year's shoots; cut dead limbs off the apple tree; trim the roses with the shears
        prune; remove old growth; thin out woody growth; carry out seasonal pruning; carry out thinning; prune woody growth
        rotation
        move the beans to another bed each year; plant tomatoes in a new place; swap the corner of peas and cabbage; draw a plan of four beds; follow potatoes with beans; give onions a different bed each time; move tomatoes to a new bed; swap potatoes and peas each year
        rotate crops; practise crop rotation; vary the location of vegetables; alternate crop locations; alternate vegetables; practise rotation
        soil
        send a handful of dirt to the lab; buy strips that show the acid; dig down and feel the clay; squeeze some dirt in your fist; order a kit for lime and acid; ask the lab for the numbers; buy a kit and send dirt to the lab; dig down and squeeze the clay
        test the soil; determine soil quality; analyse the pH; assess nutrient levels; analyse soil nutrients; determine the pH
        natives
        choose flowers that grow wild nearby; ask the nursery what belongs here; sow a local meadow; pick shrubs from your own county; look at what thrives next door; leave a corner to wild flowers; choose local shrubs at the nursery; sow flowers that grow wild nearby
        use native plants; favour indigenous species; select regionally adapted species; plant native species; favour regionally adapted plants; select native plants
        poison !
        spray everything twice a week; drown the bugs in chemicals; buy the strongest spray in the shop; fog the whole yard; empty the bottle on the aphids; spray while the bees fly; spray the strongest chemicals in the yard; drown the aphids with the bottle
        overuse pesticides; apply insecticide excessively; rely on toxic pest control; use harmful insecticide; rely on pesticides; apply toxic pest control
        salt !
        pour salt on the weeds; splash bleach between the tiles; tip brine along the path; kill dandelions with table salt; scatter road salt over the drive; boil up vinegar and bleach; kill weeds with bleach; scatter salt along the path
        damage the ground with home-made herbicide; sterilise the earth; contaminate the earth with unsuitable substances; control unwanted plants with damaging substances; contaminate the ground; use damaging home-made herbicide
        """,
    ),
]

TOPIC_INDEX: dict[str, int] = {topic.name: i for i, topic in enumerate(TOPICS)}
